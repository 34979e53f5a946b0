"""Registers the logger ``aim``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_aim.config import AimConfig
from nanochat_core import hookimpl

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_loggers(registry: Registrar) -> None:
    registry.add(
        "aim",
        config=AimConfig,
        factory="nanochat_aim.logger:Aim",
        check="nanochat_aim.check:check",
        summary="an Aim repository, on disk or behind a server",
        requires=("aim",),
        install="pip install 'nanochat-core[aim]' (Aim has no packages for Python 3.13)",
    )
