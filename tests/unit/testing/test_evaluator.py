"""``check_evaluator`` notices each way of breaking the contract of evaluators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat_core import Evaluation, Evaluator, Model
from nanochat_core.testing import check_evaluator


class Finds(Evaluator):
    def __init__(self, config: Any, context: Any) -> None:
        self.config = config

    def evaluate(self, model: Model, step: int) -> Evaluation:
        with torch.enable_grad():
            return self.config(model, step)


def drifts(model: Model, step: int) -> Evaluation:
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return Evaluation({"a": 1.0})


@pytest.mark.parametrize(
    ("find", "reason"),
    [
        (lambda model, step: Evaluation(), "neither metrics nor texts"),
        (lambda model, step: Evaluation({"a": torch.ones(())}), "must be a Python int or float"),
        (lambda model, step: Evaluation({"step": 1}), "reserved in the ledger"),
        (lambda model, step: Evaluation({"a": float(torch.rand(()) + step)}), "of the same model has different values"),
        (drifts, "changes the model's parameters"),
    ],
)
def test_broken_evaluators(find: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_evaluator(Finds, find)


def test_check_evaluator_refuses_what_is_none() -> None:
    with pytest.raises(AssertionError, match=r"must return a nanochat_core\.Evaluator"):
        check_evaluator(lambda config, context: object(), None)  # type: ignore[arg-type,return-value]
