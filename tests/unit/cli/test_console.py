"""Tables, sizes and durations as commands print them."""

from __future__ import annotations

import pytest

from nanochat_core.cli.console import age, duration, size, table


def test_columns_are_aligned_and_nothing_stands_behind_them() -> None:
    rows = [("NAME", "STEPS", "NOTE"), ("a", "12,000", ""), ("longer", "1e5", "of 007, as 1.50")]
    assert table(rows, "lrl").splitlines() == [
        "NAME     STEPS  NOTE",
        "a       12,000",
        "longer     1e5  of 007, as 1.50",
    ]
    assert table(rows[:1], "lrl") == "NAME  STEPS  NOTE"


def test_every_row_has_all_columns() -> None:
    with pytest.raises(ValueError, match="must have 2 columns"):
        table([("a", "b"), ("c",)], "lr")


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 999, 1500, 2e6, 3.25e9, 4e12)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.0 MB", "3.2 GB", "4,000.0 GB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 119, 150, 9000)] == ["0 s", "119 s", "2.5 min", "2.5 h"]
    assert [age(s) for s in (-1, 59, 60, 7200, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
