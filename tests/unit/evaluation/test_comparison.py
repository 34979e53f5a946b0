"""Two evaluations, example by example."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_core.evaluation.comparison import compare, format_comparison
from nanochat_core.evaluation.results import Stored


def stored(values: dict[str, dict[str, float]]) -> Stored:
    centered = {task: {k: 2 * v - 1 for k, v in rows.items()} for task, rows in values.items()}
    return Stored(Path(), {"name": "core", "metrics": {}}, values, centered)


def test_comparison_is_paired() -> None:
    n = 200
    a = {"t": {str(i): float(i % 2) for i in range(n)}, "only a": {"0": 1.0}}
    b = {"t": {str(i): 1.0 if i < 10 else float(i % 2) for i in range(n)} | {"new": 1.0}}
    t, mean = compare(stored(a), stored(b))
    assert (t.task, t.n, t.wins, t.losses) == ("t", n, 5, 0)
    assert t.b - t.a == pytest.approx(5 / n)
    assert t.p == pytest.approx(2 / 2**5)
    assert 0.0 <= t.low < 0.025 < t.high < 0.06  # unpaired it would be 0.1 wide
    assert mean.b - mean.a == pytest.approx(2 * 5 / n)  # centered
    assert mean.high == pytest.approx(2 * t.high, rel=0.35)
    assert format_comparison([t, mean]).splitlines()[2].startswith("| t | 200 | 0.5000 | 0.5250 | +0.0250 |")
