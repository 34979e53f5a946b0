"""Registers the logger ``console``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_console.config import ConsoleConfig
from nanochat_core import hookimpl

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_loggers(registry: Registrar) -> None:
    registry.add(
        "console",
        config=ConsoleConfig,
        factory="nanochat_console.logger:Console",
        summary="one line per step, and a progress bar on a terminal",
        in_process=True,
    )
