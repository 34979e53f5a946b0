"""Registers the data source ``python_docs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_python_docs.config import PythonDocsConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_data_sources(registry: Registrar) -> None:
    registry.add(
        "python_docs",
        config=PythonDocsConfig,
        factory="nanochat_python_docs.source:build",
        summary="the documentation inside Python itself; needs no download",
        default=True,
    )
