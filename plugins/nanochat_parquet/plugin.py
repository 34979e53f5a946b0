"""Hook implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_parquet.config import ParquetConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_data_sources(registry: Registrar) -> None:
    registry.add(
        "parquet",
        config=ParquetConfig,
        factory="nanochat_parquet.source:build",
        summary="a directory of parquet shards; the last one is for validation",
        requires=("pyarrow",),
        install="pip install pyarrow",
    )
