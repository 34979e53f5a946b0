"""Registers the optimizer ``adamw``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_adamw.config import AdamWConfig
from nanochat_core import hookimpl

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_optimizers(registry: Registrar) -> None:
    registry.add(
        "adamw",
        config=AdamWConfig,
        factory="nanochat_adamw.optimizer:build",
        summary="AdamW for every parameter; decay on matrices and head only",
    )
