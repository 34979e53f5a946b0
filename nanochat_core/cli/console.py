"""Formatting of what commands print: tables, sizes, durations."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Format rows as lines of aligned columns, two spaces apart. The first row is the header.

    Args:
        alignment: one letter per column: ``l`` for text, ``r`` for numbers.

    Raises:
        ValueError: a row has more or fewer columns than ``alignment``.
    """
    from tabulate import tabulate

    if {len(row) for row in rows} != {len(alignment)}:
        raise ValueError(f"a table with the alignment {alignment!r} must have {len(alignment)} columns in all rows")
    sides = [{"l": "left", "r": "right"}[letter] for letter in alignment]
    # The header is passed as an ordinary row, since tabulate rejects an alignment for a table that has only a header.
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)
    return "\n".join(line.rstrip() for line in text.splitlines())


def size(count: float) -> str:
    """Format a number of bytes, as in ``1.5 GB``."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """Format a duration, as in ``1.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def age(seconds: float) -> str:
    """Format the time since an event in whole units, as in ``2 h``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
