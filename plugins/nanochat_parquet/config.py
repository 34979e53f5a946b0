"""Options of the data source ``parquet``."""

from pathlib import Path

import attrs

from nanochat_core import option


@attrs.frozen
class ParquetConfig:
    """Shards in the order of their names, the last for validation, the others for training."""

    path: Path = option(help="directory of two or more *.parquet files")
    text_column: str = option("text", "column of strings, one document a row; a null is an empty document")
