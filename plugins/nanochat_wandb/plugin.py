"""Registers the logger ``wandb``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_wandb.config import WandbConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_loggers(registry: Registrar) -> None:
    registry.add(
        "wandb",
        config=WandbConfig,
        factory="nanochat_wandb.logger:Wandb",
        summary="Weights & Biases, online or offline",
        check="nanochat_wandb.check:check",
        requires=("wandb",),
        install="pip install 'nanochat-core[wandb]'",
    )
