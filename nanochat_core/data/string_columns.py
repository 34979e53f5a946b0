"""Columns of texts in Parquet files. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanochat_core.files import first_few, open_regular, shorten

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

LARGEST_GROUP = 2**33  # bytes of a column in one row group, decompressed


def is_strings(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts: strings of any kind, plain or in a dictionary."""
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    views = getattr(pa.types, "is_string_view", lambda _: False)  # since pyarrow 16
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or views(value))


def string_column_problem(schema: pa.Schema, column: str) -> str:
    """Return why ``column`` can't be read as texts, with the remedy; empty if it can."""
    import pyarrow as pa

    strings = [f.name for f in schema if is_strings(f.type) and schema.names.count(f.name) == 1 and f.name != column]
    remedy = "choose a file with a column of strings"
    if strings:
        remedy = f"set it to one of {first_few([shorten(name) for name in strings], 20)}"
    count = schema.names.count(column)
    if count != 1:
        has = f"has {count} columns named {shorten(column)}" if count else f"has no column {shorten(column)}"
        return f"{has}; {remedy}"
    kind = schema.field(column).type
    if is_strings(kind):
        return ""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or "binary" in str(kind):
        remedy += ", or write it as strings: table.set_column(i, name, column.cast('string')) of pyarrow does that"
    return f"column {shorten(column)} holds {shorten(str(kind)).strip(chr(39))}, not strings; {remedy}"


def read_string_column(path: Path, column: str = "text") -> Iterator[str]:
    """Yield the texts in a column of a Parquet file; a null is an empty text.

    Raises:
        OSError: when the file can't be read.
        ValueError: when there is no such column of strings, or the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as stream, pq.ParquetFile(stream) as file:
            if problem := string_column_problem(file.schema_arrow, column):
                raise ValueError(problem)
            for batch in file.iter_batches(columns=[column], batch_size=1024):
                for value in batch.column(0):
                    yield value.as_py() or ""
    except (pa.ArrowException, MemoryError) as error:  # ArrowInvalid is a ValueError already
        raise ValueError(f"it is damaged: {error}") from error
