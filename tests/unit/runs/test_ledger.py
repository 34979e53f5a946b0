"""The ledger: flat JSON lines, rewound to what a checkpoint knows."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.runs.ledger import Ledger, read_ledger, rewind_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *records: dict[str, Any]) -> int:
    ledger = Ledger(path)
    for record in records:
        ledger.write(record["step"], {k: v for k, v in record.items() if k != "step"})
    size = ledger.bytes
    ledger.close()
    return size


def loss(step: int) -> dict[str, Any]:
    return {"step": step, "train/loss": 1.0 / (step + 1)}


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "evaluator": "bpb", "val/bpb": 2.0}


def kinds(path: Path) -> list[tuple[int, str]]:
    return [(r["step"], "eval" if "evaluator" in r else "train") for r in read_ledger(path)]


def test_a_line_is_one_flat_object_with_step_and_time(path: Path) -> None:
    before = time.time()
    ledger = Ledger(path)
    record = ledger.write(3, {"train/loss": 0.1, "text": "zwei\nZeilen ☃"})
    assert list(read_ledger(path)) == [record]  # it is flushed
    assert record["step"] == 3
    assert before <= record["time"] <= time.time()
    assert record["text"] == "zwei\nZeilen ☃"
    assert len(path.read_bytes().splitlines()) == 1
    ledger.close()


def test_every_line_is_json_for_everybody(path: Path) -> None:
    ledger = Ledger(path)
    ledger.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300})
    ledger.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"], record["d"]) == ("nan", "inf", "-inf", 1e300)


def test_floats_come_back_exactly(path: Path) -> None:
    write(path, {"step": 0, "train/loss": 1 / 3})
    assert next(read_ledger(path))["train/loss"] == 1 / 3


def test_a_reopened_ledger_goes_on_at_its_end(path: Path) -> None:
    first = write(path, loss(0))
    assert write(path, loss(1)) > first == path.read_bytes().index(b"\n") + 1
    assert kinds(path) == [(0, "train"), (1, "train")]


def test_a_line_cut_short_is_left_out(path: Path) -> None:
    write(path, loss(0))
    with path.open("ab") as file:
        file.write(b'{"step": 1, "tra')
    assert kinds(path) == [(0, "train")]
    assert list(read_ledger(path.with_name("nothing.jsonl"))) == []


def test_rewinding_keeps_the_evaluations_of_the_step_itself(path: Path) -> None:
    size = write(path, evaluation(0), loss(0), loss(1))
    write(path, evaluation(2), loss(2), loss(3), evaluation(4))
    kept = rewind_ledger(path, size, 2)
    assert [r["step"] for r in kept] == [2]
    assert kinds(path) == [(0, "eval"), (0, "train"), (1, "train"), (2, "eval")]
    assert kinds(path.with_name("metrics.rewound.jsonl")) == [(2, "train"), (3, "train"), (4, "eval")]


def test_rewinding_what_is_at_the_checkpoint_changes_nothing(path: Path) -> None:
    size = write(path, loss(0))
    before = path.read_bytes()
    assert rewind_ledger(path, size, 1) == []
    assert path.read_bytes() == before
    assert not path.with_name("metrics.rewound.jsonl").exists()


def test_rewinding_twice_collects_all_that_was_taken_back(path: Path) -> None:
    size = write(path, loss(0))
    write(path, loss(1))
    rewind_ledger(path, size, 1)
    write(path, loss(1), loss(2))
    rewind_ledger(path, size, 1)
    assert kinds(path) == [(0, "train")]
    assert [r["step"] for r in read_ledger(path.with_name("metrics.rewound.jsonl"))] == [1, 1, 2]


def test_rewinding_takes_a_torn_line_away(path: Path) -> None:
    size = write(path, loss(0))
    with path.open("ab") as file:
        file.write(b'{"step": 1, "evaluator": "b')
    assert rewind_ledger(path, size, 1) == []
    write(path, loss(1))
    assert kinds(path) == [(0, "train"), (1, "train")]


def test_a_ledger_that_lost_its_end_in_a_power_cut_goes_on_at_a_whole_line(path: Path) -> None:
    size = write(path, loss(0), loss(1))
    path.write_bytes(path.read_bytes()[:-10])
    assert rewind_ledger(path, size, 2) == []
    write(path, loss(2))
    assert kinds(path) == [(0, "train"), (2, "train")]


@pytest.mark.parametrize("lost", [0, 10, 100, 150])
def test_rewinding_that_was_killed_is_done_again(path: Path, lost: int) -> None:
    """After lines were put aside, all or some, the last one torn, and before they were taken out of the ledger."""
    size = write(path, loss(0))
    write(path, loss(1))
    rewind_ledger(path, size, 1)
    write(path, loss(1), evaluation(1), loss(2), loss(3))
    ledger, aside = path.read_bytes(), path.with_name("metrics.rewound.jsonl")
    rewind_ledger(path, size, 1)
    expected = path.read_bytes(), aside.read_bytes()
    path.write_bytes(ledger)
    aside.write_bytes(expected[1][: len(expected[1]) - lost])
    assert [r["step"] for r in rewind_ledger(path, size, 1)] == [1]
    assert (path.read_bytes(), aside.read_bytes()) == expected
