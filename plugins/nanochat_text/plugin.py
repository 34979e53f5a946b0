"""Registers the data sources ``jsonl`` and ``text``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_text.config import JsonlConfig, TextConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_data_sources(registry: Registrar) -> None:
    registry.add(
        "jsonl",
        config=JsonlConfig,
        factory="nanochat_text.source:build_jsonl",
        summary="JSON lines, one document per line, plain or compressed (.gz, .zst)",
        requires=("pyarrow",),
        install="pip install pyarrow",
    )
    registry.add(
        "text",
        config=TextConfig,
        factory="nanochat_text.source:build_text",
        summary="text files, one document per file, or separated by a line, plain or compressed (.gz, .zst)",
        requires=("pyarrow",),
        install="pip install pyarrow",
    )
