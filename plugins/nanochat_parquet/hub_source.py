"""The data sources ``fineweb_edu``, ``climbmix`` and ``hub_parquet``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from nanochat_core import DataContext, DataError, DataSource, Documents, Split, UnreadablePlaces
from nanochat_parquet.config import ClimbmixConfig, FinewebEduConfig, HubConfig, HubParquetConfig
from nanochat_parquet.documents import ParquetDocuments, Shard
from nanochat_parquet.downloads import ArrivingFile, Downloads, download_all, say
from nanochat_parquet.hub import Hub
from nanochat_parquet.hub_listing import HubFile

FOOTERS_AT_ONCE = 16


class HubSource(DataSource):
    """A data set on the hub: its first shards for training, the last one for validation.

    The number of documents comes from the shards' footers, a few KB each; the shards themselves are fetched in the
    background once the first document is read, some of them ahead of the reader.

    Args:
        hub: the data set.
        config: the options.
        names: of all its shards, in order; None: those on the hub that match ``config.files``.
    """

    def __init__(self, hub: Hub, config: HubConfig, names: Sequence[str] | None = None) -> None:
        self._hub, self._config, self._names = hub, config, names
        self._problems = UnreadablePlaces(config.on_error)

    @cached_property
    def _files(self) -> list[HubFile]:
        """The training files and, last, the validation file."""
        names = self._names
        if names is None:
            assert isinstance(self._config, HubParquetConfig)
            names = self._hub.names(self._config.files)
        if self._config.shards >= len(names):
            raise DataError(
                f"{self._hub.repo} has {len(names)} shards, one of them for validation; "
                f"set data.shards to at most {len(names) - 1}",
                key="shards",
            )
        return self._hub.files([*names[: self._config.shards], names[-1]])

    @cached_property
    def _downloads(self) -> Downloads:
        return Downloads(self._hub, self._files, self._config.text_column, self._config.workers)

    @cached_property
    def _shards(self) -> list[Shard]:
        missing = sum(self._hub.local(file) is None for file in self._files)
        if missing:
            here = len(self._files) - missing
            say(f"{self._hub.repo}: {here} of {len(self._files)} shards are here, the others are fetched when needed")
        column = self._config.text_column
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
            footers = list(threads.map(lambda file: self._hub.footer(file, column), self._files))
        return [
            Shard(ArrivingFile(f"{self._hub.repo}/{file.name}", file.size, i, self._downloads), footer)
            for i, (file, footer) in enumerate(zip(self._files, footers, strict=True))
        ]

    def documents(self, split: Split) -> Documents:
        """The split's documents. Reading a document of a shard that is not on this machine waits for its download.

        Raises:
            DataError: when the hub is not available or a shard lacks the column; from reading, when a download fails.
        """
        return self._train if split == "train" else self._val

    @cached_property
    def _train(self) -> Documents:
        self._hub.check_disk_space([file for file in self._files if self._hub.local(file) is None])
        return ParquetDocuments(self._shards[:-1], self._config.text_column, self._problems)

    @cached_property
    def _val(self) -> Documents:
        return ParquetDocuments(self._shards[-1:], self._config.text_column, self._problems)

    def fingerprint(self, split: Split) -> str:
        """Digest of the column's name and of each shard's name, size and checksum from the hub."""
        digest = hashlib.sha256(self._config.text_column.encode())
        for file in self._files[:-1] if split == "train" else self._files[-1:]:
            digest.update(f"\n{file.name} {file.size} {file.etag}".encode())
        return digest.hexdigest()

    def problems(self) -> Sequence[str]:
        return self._problems.lines()

    def describe(self) -> Mapping[str, str | int]:
        return {
            "repo": self._hub.repo,
            "revision": self._config.revision,
            "files": len(self._files),
            "missing": sum(self._hub.local(file) is None for file in self._files),
            "bytes": sum(file.size for file in self._files),
            "row_groups": sum(len(shard.footer.rows) for shard in self._shards),
            "text_bytes": sum(shard.footer.text_bytes for shard in self._shards[:-1]),
        }

    def download(self, workers: int) -> Sequence[str]:
        return download_all(self._hub, self._files, self._config.text_column, workers)


def numbered(count: int) -> list[str]:
    """Names of ``count`` shards: ``shard_00000.parquet`` and so on."""
    return [f"shard_{i:05d}.parquet" for i in range(count)]


def hub_directory(cache_dir: Path) -> Path:
    return cache_dir / "hub"


def build_fineweb_edu(config: FinewebEduConfig, context: DataContext) -> HubSource:
    hub = Hub("karpathy/fineweb-edu-100b-shuffle", config.revision, hub_directory(context.cache_dir))
    return HubSource(hub, config, numbered(1823))


def build_climbmix(config: ClimbmixConfig, context: DataContext) -> HubSource:
    hub = Hub("karpathy/climbmix-400b-shuffle", config.revision, hub_directory(context.cache_dir))
    return HubSource(hub, config, numbered(6543))


def build_hub_parquet(config: HubParquetConfig, context: DataContext) -> HubSource:
    return HubSource(Hub(config.repo, config.revision, hub_directory(context.cache_dir)), config)
