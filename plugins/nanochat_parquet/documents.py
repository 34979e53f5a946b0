"""A sequence of the documents in the row groups of many parquet files, read on demand."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from threading import Lock
from typing import Any

import attrs
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_core import LARGEST_GROUP, DataError, Documents, UnreadablePlaces, string_column_problem
from nanochat_parquet.files import File, read_tail

# Memory for row groups. Lanes of a training run drift apart, so that several row groups are in use at once.
CACHE_BYTES = 256 * 2**20
MOST_ROWS = 2**31  # of a row group


@attrs.frozen
class Footer:
    """The footer of a parquet file.

    Args:
        rows: number of rows of each row group.
        text_bytes: approximate size of all texts.
        metadata: the whole footer, parsed.
    """

    rows: tuple[int, ...]
    text_bytes: int
    metadata: pq.FileMetaData = attrs.field(eq=False, repr=False)


@attrs.frozen
class Shard:
    """A parquet file and its footer."""

    file: File
    footer: Footer


class ParquetDocuments(Documents):
    """The rows of the shards, in order. Nulls and documents that are skipped are empty.

    Reading neighbouring documents reads each row group once.

    Args:
        column: name of the column of texts.
        problems: records places that can't be read.
        cache_bytes: memory for row groups, of which at least one is kept.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        column: str,
        problems: UnreadablePlaces | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._column, self._problems, self._cache_bytes = column, problems or UnreadablePlaces(), cache_bytes
        self._groups = [(shard, i) for shard in shards for i in range(len(shard.footer.rows))]
        self._starts = [0, *accumulate(rows for shard in shards for rows in shard.footer.rows)]
        self._cache: OrderedDict[int, pa.ChunkedArray | None] = OrderedDict()  # most recently used last
        self._cached_bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, indices: Iterable[int]) -> Iterator[str]:
        start = stop = 0
        for index in indices:
            if not start <= index < stop:
                group = bisect_right(self._starts, index) - 1
                start, stop = self._starts[group], self._starts[group + 1]
                column = self._row_group(group)
            try:
                yield "" if column is None else column[index - start].as_py() or ""
            except UnicodeDecodeError as error:
                shard, i = self._groups[group]
                what = f"row {index - start} of row group {i} of {shard.file.name} is not UTF-8 ({error})"
                self._problems.report(what, "repair the file", error)
                yield ""

    def _row_group(self, group: int) -> pa.ChunkedArray | None:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        column = self._read_file(group)
        with self._lock:
            if group not in self._cache:
                self._cache[group] = column
                self._cached_bytes += _size(column)
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= _size(self._cache.popitem(last=False)[1])
        return column

    def _read_file(self, group: int) -> pa.ChunkedArray | None:
        """A row group's texts; None when it can't be read, and is skipped."""
        shard, i = self._groups[group]
        rows = shard.footer.rows[i]
        what = f"row group {i} of {shard.file.name} can't be read"
        try:
            with shard.file.open() as stream, pq.ParquetFile(stream, metadata=shard.footer.metadata) as file:
                column = file.read_row_group(i, columns=[self._column], use_threads=False)[self._column]
        except FileNotFoundError as error:  # the file or its disk is missing, which on_error = "skip" does not excuse
            raise DataError(f"{what} ({error}); restore this file", key="path") from error
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            self._problems.report(f"{what}: its {rows} documents ({error})", "download or copy this file again", error)
            return None
        if len(column) != rows:
            self._problems.report(
                f"{what}: it holds {len(column)} rows instead of {rows}", "download or copy this file again"
            )
            return None
        return column


def _size(column: pa.ChunkedArray | None) -> int:
    return 0 if column is None else column.nbytes


def read_shard(file: File, column: str) -> Shard:
    """Read the footer of a file.

    Raises:
        DataError: when the column is missing or does not hold strings.
        pa.ArrowException, OSError: when the file is damaged.
    """
    return Shard(file, parse_footer(file.name, read_tail(file), column))


def parse_footer(name: str, tail: bytes, column: str) -> Footer:
    """Parse the footer of a parquet file.

    Args:
        name: of the file, for messages.
        tail: the footer and the eight bytes after it.
        column: name of the column of texts, which must exist.

    Raises:
        DataError: when the column is missing or does not hold strings.
        pa.ArrowException, OSError: when the footer is damaged.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(tail)) as parsed:
            schema, metadata = parsed.schema_arrow, parsed.metadata
        list(schema.names)  # decodes them
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"its footer is damaged: {error}") from error
    _check_column(name, schema, column)
    groups = list(_groups(metadata, column))
    text_bytes = sum(size - 4 * rows for rows, size in groups)  # 4: length of each text
    return Footer(tuple(rows for rows, _ in groups), max(text_bytes, 0), metadata)


def _groups(metadata: Any, column: str) -> Iterator[tuple[int, int]]:
    """Number of rows of each row group, and of bytes of its texts.

    Raises:
        pa.ArrowInvalid: when the footer is damaged.
    """
    try:
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            chunks = (group.column(k) for k in range(group.num_columns))
            size = next((chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column), 0)
            if not 0 <= group.num_rows <= MOST_ROWS:
                raise pa.ArrowInvalid(f"its footer is damaged: row group {i} has {group.num_rows:,} rows")
            if size > LARGEST_GROUP:
                raise pa.ArrowInvalid(
                    f"row group {i} holds {size:,} bytes of texts, more than the {LARGEST_GROUP:,} that are read at "
                    f"once: write it with smaller row groups"
                )
            yield group.num_rows, size
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"its footer is damaged: {error}") from error


def _check_column(name: str, schema: pa.Schema, column: str) -> None:
    if problem := string_column_problem(schema, column):
        raise DataError(f"{name} {problem}", key="text_column")
