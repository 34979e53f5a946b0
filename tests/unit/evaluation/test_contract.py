"""A result of an evaluator counts only when the ledger and the files of evaluations can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nanochat_core import Evaluation
from nanochat_core.evaluation.contract import BadResult, checked, reserved_problem
from nanochat_core.evaluation.results import write_evaluation

ROW = {"task": "t", "example": "e", "value": 1.0}
RECURSIVE: dict[str, Any] = {}
RECURSIVE["a"] = RECURSIVE


class Lying(Mapping[str, float]):
    """A mapping that fails when it is read."""

    def __getitem__(self, key: str) -> float:
        raise KeyError(key)

    def __iter__(self) -> Any:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "must return a nanochat_core.Evaluation"),
        ({"a": 1.0}, "must return a nanochat_core.Evaluation"),
        (Evaluation(None), "metrics must be a mapping"),  # type: ignore[arg-type]
        (Evaluation([("a", 1.0)]), "metrics must be a mapping"),  # type: ignore[arg-type]
        (Evaluation({("a",): 1.0}), "name of a metric must be a str"),  # type: ignore[dict-item]
        (Evaluation({None: 1.0}), "name of a metric must be a str"),  # type: ignore[dict-item]
        (Evaluation({"a\n": 1.0}), "printable"),
        (Evaluation({"a": True}), "Python int or float"),
        (Evaluation({"a": "1"}), "Python int or float"),  # type: ignore[dict-item]
        (Evaluation({"a": 10**400}), "fits a float"),
        (Evaluation({"a": 10**5000}), "fits a float"),
        (Evaluation({"a": 1.0}, texts={"a": "x"}), "both a metric and a text"),
        (Evaluation(texts={"a": "\ud800"}), "valid Unicode"),
        (Evaluation(texts={"a": b"x"}), "must be a str"),  # type: ignore[dict-item]
        (Evaluation(notes="abc"), "notes must be a sequence"),
        (Evaluation(notes=[5]), "a note must be a str"),  # type: ignore[list-item]
        (Evaluation(facts={"a": object()}), "JSON can hold"),
        (Evaluation(facts={"a": "\udfff"}), "JSON can hold"),
        (Evaluation(facts=RECURSIVE), "JSON can hold"),
        (Evaluation(settings={5: 1}), "must be texts"),  # type: ignore[dict-item]
        (Evaluation(examples=[{"task": "t"}]), "needs task, example and value"),
        (Evaluation(examples=[{**ROW, "value": "x"}]), "must be a number"),
        (Evaluation(examples=[{**ROW, "example": 5}]), "must be a str"),
        (Evaluation(examples=[{**ROW, "more": object()}]), "can't be written"),
        (Evaluation(examples=[{**ROW, "more": 1}, {**ROW, "more": "x"}]), "can't be written"),
        (Evaluation(examples=[{**ROW, "more": {}}]), "can't be written"),
        (Evaluation(files={"../x": "a"}), "can't be written"),
        (Evaluation(files={"/x": "a"}), "can't be written"),
        (Evaluation(files={"a/b": "a"}), "can't be written"),
        (Evaluation(files={"evaluation.json": "a"}), "belongs to the core"),
        (Evaluation(files={"a.bin": b"a"}), "must be a str"),  # type: ignore[dict-item]
    ],
)
def test_what_can_not_be_kept_is_refused(result: Any, reason: str) -> None:
    with pytest.raises(BadResult, match=reason):
        checked(result)


def test_a_mapping_that_fails_is_the_evaluators_failure() -> None:
    with pytest.raises(KeyError):
        checked(Evaluation(Lying()))


def test_what_is_kept_is_plain_and_complete(tmp_path: Path) -> None:
    rows = [{**ROW, "value": 1}, {**ROW, "value": True, "later": "x"}]
    facts = {"list": [1]}
    kept = checked(Evaluation({"a": 10**30, "b": float("nan")}, {"t": "\x00"}, rows, {"f.csv": "é"}, facts))
    facts["list"].append(2)
    assert kept.facts == {"list": [1]}
    assert kept.metrics["a"] == 1e30
    path = write_evaluation(tmp_path, "mine", 3, kept)
    table = pq.read_table(path / "examples.parquet").to_pylist()
    assert [(row["value"], row["later"]) for row in table] == [(1.0, None), (1.0, "x")]
    assert (path / "f.csv").read_bytes() == "é".encode()


def test_names_in_use_are_refused() -> None:
    owners = {"val/bpb": "bpb"}
    for name in ("step", "time", "evaluator", "train/loss", "train/new", "total_training_time"):
        assert "reserved" in reserved_problem(name, owners, "mine")
    assert "of the entry 'bpb'" in reserved_problem("val/bpb", owners, "mine")
    assert not reserved_problem("val/bpb", owners, "bpb")
    assert not reserved_problem("val/mine", owners, "mine")
