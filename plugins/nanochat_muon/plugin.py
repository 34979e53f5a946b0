"""Registers the optimizer ``muon_adamw``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_muon.config import MuonAdamWConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_optimizers(registry: Registrar) -> None:
    registry.add(
        "muon_adamw",
        config=MuonAdamWConfig,
        factory="nanochat_muon.optimizer:build",
        summary="Muon for matrices, AdamW for embedding, head and scalars",
    )
