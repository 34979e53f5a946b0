"""The data source ``parquet``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import pyarrow as pa

from nanochat_core import DataContext, DataError, DataSource, Documents, Split, UnreadablePlaces, hold_out
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.documents import ParquetDocuments, Shard, read_shard
from nanochat_parquet.files import File, find, hash_file, hash_samples, refuse_shared_shards

# Splits up to this many bytes on disk are hashed whole (a second or two), others by samples.
HASH_WHOLE = 2**30


class ParquetSource(DataSource):
    """Parquet shards of one or more places. Row groups may have any size.

    Raises:
        DataError: when a place is missing, or holds too few shards.
    """

    def __init__(self, config: ParquetConfig) -> None:
        self._config, self._problems = config, UnreadablePlaces(config.on_error)
        files = find(config.path, "path")
        self._files: dict[Split, list[File]] = {"train": files, "val": files}
        if config.val_path is not None:
            self._files["val"] = find(config.val_path, "val_path")
            refuse_shared_shards(files, self._files["val"], "val_path")
        elif config.val_fraction is None:
            if len(files) < 2:
                raise DataError(
                    f"{_join(config.path)} holds {len(files)} *.parquet files, but two or more are needed, "
                    f"the last for validation, the others for training; or set data.val_path or data.val_fraction",
                    key="path",
                )
            self._files = {"train": files[:-1], "val": files[-1:]}

    def documents(self, split: Split) -> Documents:
        """The split's documents; rows are read on demand.

        Raises:
            DataError: when a shard is unreadable or has no such column of strings, here or from reading.
        """
        return self._train if split == "train" else self._val

    @cached_property
    def _train(self) -> Documents:
        return self._open("train") if self._held_out is None else self._held_out[0]

    @cached_property
    def _val(self) -> Documents:
        return self._open("val") if self._held_out is None else self._held_out[1]

    @cached_property
    def _held_out(self) -> tuple[Documents, Documents] | None:
        fraction = self._config.val_fraction
        return None if fraction is None else hold_out(self._open("train"), fraction)

    @cached_property
    def _shards(self) -> dict[str, Shard | None]:
        """Every shard by name; None where the footer can't be read."""
        files = {f.name: f for f in (*self._files["train"], *self._files["val"])}
        with ThreadPoolExecutor(8) as threads:
            return dict(zip(files, threads.map(self._read_shard, files.values()), strict=True))

    def _read_shard(self, file: File) -> Shard | None:
        try:
            return read_shard(file, self._config.text_column)
        except (pa.ArrowException, OSError) as error:
            remedy = "download or copy this file again, or remove it"
            self._problems.report(f"{file.name} can't be read as parquet ({error})", remedy, error)
            return None

    def _open(self, split: Split) -> ParquetDocuments:
        readable = (self._shards[file.name] for file in self._files[split])
        shards = [shard for shard in readable if shard is not None]
        if not any(sum(shard.footer.rows) for shard in shards):
            raise DataError(
                f"the {split} shards in {_join(self._config.path)} hold no rows; check how they were written",
                key="path",
            )
        return ParquetDocuments(shards, self._config.text_column, self._problems)

    def fingerprint(self, split: Split) -> str:
        """Digest of the column's name and of each shard's name, size and bytes.

        For splits larger than 1 GiB and for files behind URLs it hashes footers (they hold the compressed size of every
        row group) and three samples per shard instead of all bytes: a change that keeps all of these is not noticed.
        """
        files = self._files[split]
        remote = any("://" in file.name for file in files)
        whole = not remote and sum(file.size for file in files) <= HASH_WHOLE
        digest = hashlib.sha256(self._config.text_column.encode())
        if self._config.val_fraction is not None:
            digest.update(f" {split} {self._config.val_fraction}".encode())
        with ThreadPoolExecutor(8 if remote else 2) as threads:
            for file, content in zip(files, threads.map(hash_file if whole else hash_samples, files), strict=True):
                name = os.fsencode(file.name.rpartition("/")[2])
                digest.update(b"\n" + name + f" {file.size} ".encode() + content)
        return digest.hexdigest()

    def problems(self) -> Sequence[str]:
        return self._problems.lines()

    def describe(self) -> Mapping[str, str | int]:
        files = {f.name: f for f in (*self._files["train"], *self._files["val"])}
        shards = [self._shards[file.name] for file in self._files["train"]]
        text_bytes = sum(shard.footer.text_bytes for shard in shards if shard is not None)
        fraction = self._config.val_fraction or 0.0
        return {
            "files": len(files),
            "bytes": sum(file.size for file in files.values()),
            "row_groups": sum(len(shard.footer.rows) for shard in self._shards.values() if shard is not None),
            "text_bytes": round(text_bytes * (1 - fraction)),
        }


def _join(path: str | tuple[str, ...]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def build(config: ParquetConfig, context: DataContext) -> ParquetSource:
    return ParquetSource(config)
