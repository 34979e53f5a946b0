"""What commands print: tables, sizes, durations."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Rows as lines of aligned columns, two spaces apart, the first row being the header.

    Args:
        alignment: a letter for each column: ``l`` for text, ``r`` for numbers.

    Raises:
        ValueError: a row has more or fewer columns than ``alignment``.
    """
    from tabulate import tabulate

    if {len(row) for row in rows} != {len(alignment)}:
        raise ValueError(f"a table with the alignment {alignment!r} must have {len(alignment)} columns in all rows")
    sides = [{"l": "left", "r": "right"}[letter] for letter in alignment]
    # The header is a row like the others: tabulate takes no alignment for a table of a header alone.
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)
    return "\n".join(line.rstrip() for line in text.splitlines())


def size(count: float) -> str:
    """Bytes, as in ``1.5 GB``."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """How long something takes, as in ``1.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def age(seconds: float) -> str:
    """How long ago something was, in whole units, as in ``2 h``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
