"""What an evaluator leaves changed is put back, and named; changed weights end the evaluation."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

from nanochat_core import Evaluation, Evaluator, Model, PluginError
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.evaluation.evaluate import evaluate
from nanochat_core.plugins.choice import Choice, EvaluatorKeys
from nanochat_core.testing.optimizer import TinyModel


class WithTables(TinyModel):
    """A model with a table that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("table", torch.ones(3), persistent=False)


@attrs.frozen
class Does(Evaluator):
    what: Callable[[Model], Any]

    def evaluate(self, model: Model, step: int) -> Evaluation:
        self.what(model)
        return Evaluation({"val/mine": 1.0})


def run(model: Model, what: Callable[[Model], Any]) -> list[str]:
    """Evaluate, and return what was reported."""
    said: list[str] = []
    world = EvaluationWorld(0, 1, torch.device("cpu"))
    choice = Choice(EvaluatorKeys("mine", "mine"), None, None)
    evaluate(choice, Does(what), model, torch.float32, 3, world, report=said.append)
    return said


def backward(model: Model) -> None:
    with torch.enable_grad():
        model.logits(model.hidden(torch.zeros(1, 2, dtype=torch.int64))).sum().backward()


def replace(model: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def freeze(model: Model) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def hook(*_: object) -> None:
    raise AssertionError


MODEL = {
    "gradients": backward,
    "parameters and modules": replace,
    "requires_grad": freeze,
    "dtype, shape or memory of parameters": lambda model: model.half(),
    "hooks": lambda model: model.register_forward_hook(hook),
    "hooks ": lambda model: next(model.parameters()).register_hook(hook),
    "parameters and modules ": lambda model: setattr(model, "block", nn.Identity()),
    "methods": lambda model: setattr(model, "hidden", None),
    "buffers": lambda model: model.kept.zero_(),
}
PROCESS: dict[str, Callable[[Any], Any]] = {
    "working directory": lambda _: os.chdir("/"),
    "umask": lambda _: os.umask(0o777),
    "signal handlers": lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "recursion limit": lambda _: sys.setrecursionlimit(12345),
    "stdout and stderr": lambda _: setattr(sys, "stdout", None),
    "grad mode": lambda _: torch.set_grad_enabled(True),
    "number of threads": lambda _: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype": lambda _: torch.set_default_dtype(torch.float64),
    "default device": lambda _: torch.set_default_device("meta"),
    "autocast": lambda _: torch.set_autocast_enabled("cpu", True),
    "anomaly mode": lambda _: torch.autograd.set_detect_anomaly(True),
    "determinism": lambda _: torch.use_deterministic_algorithms(True),
    "precision of matrix products": lambda _: torch.set_float32_matmul_precision("medium"),
    "numpy's treatment of errors": lambda _: np.seterr(all="raise"),
}


@pytest.fixture
def model() -> Iterator[WithTables]:
    torch.manual_seed(1)
    made = WithTables()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    parameters, modules = dict(made.named_parameters()), dict(made.named_modules())
    yield made
    assert {name: id(p) for name, p in made.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert dict(made.named_modules()) == modules
    assert all(p.dtype == torch.float32 and p.requires_grad and p.grad is None for p in made.parameters())
    assert made.table.dtype == torch.float32
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in before.items())
    made(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)).backward()  # no hook is left


@pytest.mark.parametrize("what", MODEL)
def test_what_can_be_put_back_of_the_model_is(model: WithTables, what: str) -> None:
    (said,) = run(model, MODEL[what])
    assert said.startswith("evaluator mine left changed")
    if what != "methods":
        assert f"the model's {what.strip()}" in said


@pytest.mark.parametrize("what", PROCESS)
def test_settings_of_the_process_are_put_back(model: WithTables, what: str) -> None:
    before = Path.cwd(), torch.get_num_threads(), torch.get_default_dtype(), sys.stdout, np.geterr()
    (said,) = run(model, PROCESS[what])
    assert what in said
    assert before == (Path.cwd(), torch.get_num_threads(), torch.get_default_dtype(), sys.stdout, np.geterr())
    assert run(model, lambda _: None) == []


def test_an_evaluator_that_behaves_is_not_named(model: WithTables) -> None:
    assert run(model, lambda m: m.logits(m.hidden(torch.zeros(1, 2, dtype=torch.int64)))) == []
    assert run(model, lambda m: m.train()) == []
    assert run(model, lambda _: torch.manual_seed(5)) == []


@pytest.mark.parametrize("through_data", [False, True])
def test_changed_weights_end_the_run(through_data: bool) -> None:
    def change(model: Model) -> None:
        for parameter in model.parameters():
            (parameter.data if through_data else parameter).mul_(0.5)

    with pytest.raises(PluginError, match=r"^'mine' has changed weights of the model: .*embedding.weight.*--resume"):
        run(WithTables(), change)
