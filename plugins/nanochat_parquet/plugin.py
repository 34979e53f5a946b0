"""Registers the data sources ``parquet``, ``fineweb_edu``, ``climbmix`` and ``hub_parquet``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_parquet.config import ClimbmixConfig, FinewebEduConfig, HubParquetConfig, ParquetConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_data_sources(registry: Registrar) -> None:
    registry.add(
        "parquet",
        config=ParquetConfig,
        factory="nanochat_parquet.source:build",
        summary="parquet shards on disk, in an object store or behind URLs; the last one is for validation",
        requires=("pyarrow", "tenacity"),
        install="pip install pyarrow tenacity",
    )
    on_the_hub = {
        "fineweb_edu": (FinewebEduConfig, "FineWeb-Edu, 100B tokens, shuffled, from the Hugging Face hub"),
        "climbmix": (ClimbmixConfig, "ClimbMix, 400B tokens, shuffled, from the Hugging Face hub"),
        "hub_parquet": (HubParquetConfig, "the parquet files of any data set on the Hugging Face hub"),
    }
    for name, (config, summary) in on_the_hub.items():
        registry.add(
            name,
            config=config,
            factory=f"nanochat_parquet.hub_source:build_{name}",
            summary=summary,
            requires=("huggingface_hub", "pyarrow", "tenacity"),
            install="pip install huggingface_hub tenacity",
            limit_option="shards",
        )
