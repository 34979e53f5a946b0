"""Comma-separated values, read back with Python's own reader."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from helpers.support import losses, metrics


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def series(rows: list[dict[str, str]], name: str) -> dict[int, float]:
    pairs = [(int(row["step"]), float(row["value"])) for row in rows if row["name"] == name]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_a_resumed_run_has_every_step_once(logged: Path) -> None:
    rows = read(logged / "csv" / "metrics.csv")
    assert series(rows, "train/loss") == losses(logged)
    assert series(rows, "val/bpb") == metrics(logged, "val/bpb")
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    texts = read(logged / "csv" / "texts.csv")
    assert {int(row["step"]) for row in texts} >= {12}
    about = json.loads((logged / "csv" / "run.json").read_text())
    assert (about["status"], about["group"], about["tags"]) == ("finished", "arms", ["a", "b"])
    assert about["experiment"]["model"]["plugin"] == "gpt"
