"""A sequence of documents over the row groups of many files, read when asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import overload

import attrs
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_core import DataError

# Lanes of a training run drift apart, so that several row groups are in use at once. What is kept in memory for them:
CACHE_BYTES = 256 * 2**20


@attrs.frozen
class Shard:
    """A parquet file and the number of rows of each of its row groups."""

    path: Path
    rows: tuple[int, ...]


class Documents(Sequence[str]):
    """Every row of the shards, in order. A null is an empty document.

    Any thread may read. A slice reads each row group it touches once, whatever its step.
    """

    def __init__(self, shards: Sequence[Shard], column: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._column, self._cache_bytes = column, cache_bytes
        self._groups = [(shard.path, i) for shard in shards for i in range(len(shard.rows))]
        self._starts = [0, *accumulate(rows for shard in shards for rows in shard.rows)]
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()  # most recently used last
        self._cached_bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self._read(range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return next(self._read(range(index % len(self), len(self))))

    def __iter__(self) -> Iterator[str]:
        return self._read(range(len(self)))

    def _read(self, indices: range) -> Iterator[str]:
        start = stop = 0
        for index in indices:
            if not start <= index < stop:
                group = bisect_right(self._starts, index) - 1
                start, stop = self._starts[group], self._starts[group + 1]
                column = self._row_group(group)
            yield column[index - start].as_py() or ""

    def _row_group(self, group: int) -> pa.ChunkedArray:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        column = self._read_file(group)
        with self._lock:
            if group not in self._cache:
                self._cache[group] = column
                self._cached_bytes += column.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return column

    def _read_file(self, group: int) -> pa.ChunkedArray:
        path, i = self._groups[group]
        try:
            with pq.ParquetFile(path) as file:
                return file.read_row_group(i, columns=[self._column], use_threads=False)[self._column]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"data.path: row group {i} of {path} can't be read ({error}); get this file again"
            ) from error
