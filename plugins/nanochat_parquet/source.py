"""The data source ``parquet``."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_core import DataContext, DataError, DataSource, Split
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.documents import Documents, Shard

# Splits up to this many bytes are hashed whole (a second or two), larger ones by samples.
HASH_WHOLE = 2**30
SAMPLE = 2**16


class ParquetSource(DataSource):
    """Shards of a directory. Row groups may have any size.

    Raises:
        DataError: when the directory is missing or holds fewer than two shards.
    """

    def __init__(self, directory: Path, text_column: str) -> None:
        self._directory, self._column = directory.expanduser(), text_column
        if not self._directory.is_dir():
            raise DataError(f"data.path: {self._directory} is no directory; point data.path at your *.parquet shards")
        self._paths = sorted(self._directory.glob("*.parquet"))
        if len(self._paths) < 2:
            raise DataError(
                f"data.path: {self._directory} holds {len(self._paths)} *.parquet files, but two or more are needed: "
                f"the last is for validation, the others for training"
            )

    def documents(self, split: Split) -> Documents:
        """The split's documents; rows are read when they are asked for.

        Raises:
            DataError: when a shard is unreadable or has no such column of strings, here or at the first access.
        """
        return self._train if split == "train" else self._val

    @cached_property
    def _train(self) -> Documents:
        return self._open("train")

    @cached_property
    def _val(self) -> Documents:
        return self._open("val")

    def _shards(self, split: Split) -> list[Path]:
        return self._paths[:-1] if split == "train" else self._paths[-1:]

    def _open(self, split: Split) -> Documents:
        shards = [read_footer(path, self._column) for path in self._shards(split)]
        if not any(sum(shard.rows) for shard in shards):
            raise DataError(f"data.path: the {split} shards in {self._directory} hold no rows; get them again")
        return Documents(shards, self._column)

    def fingerprint(self, split: Split) -> str:
        """Digest of the column's name and of each shard's name, size and bytes.

        Of splits larger than 1 GiB it takes the footers (they hold the compressed size of every row group) and three
        samples a shard instead of all bytes: a change that keeps all of these goes unseen.
        """
        paths = self._shards(split)
        whole = sum(path.stat().st_size for path in paths) <= HASH_WHOLE
        digest = hashlib.sha256(self._column.encode())
        for path in paths:
            digest.update(f"\n{path.name} {path.stat().st_size} ".encode())
            digest.update(hash_file(path) if whole else hash_samples(path))
        return digest.hexdigest()


def read_footer(path: Path, column: str) -> Shard:
    """What the end of a parquet file says: its row groups, and whether the column is there.

    Raises:
        DataError: when the file is damaged, or the column is missing or not of strings.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    if column not in schema.names:
        raise DataError(
            f"data.path: {path} has no column {column!r}; set data.text_column to one of "
            f"{', '.join(map(repr, schema.names))}"
        )
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
        raise DataError(
            f"data.path: column {column!r} of {path} holds {kind}, not strings; set data.text_column to one of "
            f"{', '.join(map(repr, schema.names))}"
        )
    return Shard(path, rows)


def damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"data.path: {path} can't be read as parquet ({error}); get this file again, or remove it")


def hash_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def hash_samples(path: Path) -> bytes:
    """sha256 of the footer and of 64 KiB at the start, in the middle and at the end."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little")
        for start, length in ((0, SAMPLE), (size // 2, SAMPLE), (size - SAMPLE, SAMPLE), (size - 8 - footer, footer)):
            file.seek(max(0, start))
            digest.update(file.read(length))
    return digest.digest()


def build(config: ParquetConfig, context: DataContext) -> ParquetSource:
    return ParquetSource(config.path, config.text_column)
