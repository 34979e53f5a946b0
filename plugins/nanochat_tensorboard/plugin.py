"""Registers the logger ``tensorboard``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_tensorboard.config import TensorBoardConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_loggers(registry: Registrar) -> None:
    registry.add(
        "tensorboard",
        config=TensorBoardConfig,
        factory="nanochat_tensorboard.logger:TensorBoard",
        check="nanochat_tensorboard.check:check",
        summary="event files for TensorBoard",
        requires=("tensorboard",),
        install="pip install 'nanochat-core[tensorboard]'",
    )
