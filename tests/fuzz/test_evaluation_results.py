"""Whatever an evaluator returns is refused with a reason, or can be written, and read back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fuzzing import inputs
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat_core import Evaluation
from nanochat_core.evaluation.contract import BadResult, checked
from nanochat_core.evaluation.results import read_evaluation, write_evaluation

pytestmark = pytest.mark.fuzz

TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["\ud800", "../x", "/etc/x", "a\x00", "", "evaluation.json"]))
NAMES = st.one_of(st.sampled_from(["a", "val/mine", "t.csv"]), TEXTS, st.none(), st.integers(), st.tuples(TEXTS))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.binary(max_size=5), st.sampled_from([10**400]),
    st.builds(object), st.builds(np.float32), st.builds(np.float64), st.datetimes(), st.complex_numbers(),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(NAMES, v, max_size=3)), max_leaves=8
)
TABLES = st.one_of(st.dictionaries(NAMES, VALUES, max_size=3), VALUES)
ROWS = st.one_of(
    VALUES,
    st.lists(
        st.fixed_dictionaries(
            {"task": st.one_of(TEXTS, SCALARS), "example": st.one_of(TEXTS, SCALARS),
             "value": st.one_of(st.floats(), st.integers(), SCALARS)},
            optional={"centered": st.one_of(st.floats(), SCALARS), "more": VALUES},
        ),
        max_size=3,
    ),
)  # fmt: skip
GOOD = st.dictionaries(st.sampled_from(["a", "b", "val/c"]), st.floats(), max_size=2)


@given(
    metrics=st.one_of(GOOD, TABLES),
    texts=st.one_of(st.just({}), TABLES),
    examples=st.one_of(st.just([]), ROWS),
    files=st.one_of(st.just({}), st.dictionaries(NAMES, TEXTS, max_size=2), TABLES),
    facts=st.one_of(st.just({}), TABLES),
    settings=st.one_of(st.just({}), TABLES),
    notes=st.one_of(st.just([]), st.lists(TEXTS, max_size=2), VALUES),
)
@example(metrics={"a": 10**5000}, texts={}, examples=[], files={}, facts={}, settings={}, notes=[])
@inputs(600)
def test_a_result_is_refused_or_kept(tried: Callable[[str], None], **fields: Any) -> None:
    tried("evaluation results")
    try:
        kept = checked(Evaluation(**fields))
    except BadResult:
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "evaluations"
        path = write_evaluation(directory, "mine", 1, kept)
        assert {p.parent for p in Path(name).rglob("*") if p.is_file()} == {path}
        stored = read_evaluation(path)
        assert stored.metrics.keys() == kept.metrics.keys()
        assert sum(map(len, stored.values.values())) == len(kept.examples)
        assert json.loads((path / "evaluation.json").read_bytes())["texts"] == kept.texts
    record = {**kept.metrics, **kept.texts}
    assert json.loads(json.dumps(record, ensure_ascii=False).encode()).keys() == record.keys()
