"""Registers the logger ``csv``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_csv.config import CSVConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_loggers(registry: Registrar) -> None:
    registry.add(
        "csv",
        config=CSVConfig,
        factory="nanochat_csv.logger:CSV",
        check="nanochat_csv.check:check",
        summary="tables for spreadsheets and pandas: metrics.csv and texts.csv",
    )
