"""Plugins that break in the middle of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.support import Site, Trained, call, losses, metrics, only_run

MISBEHAVING = """
from nanochat_core import Evaluation, Evaluator, Logger

class Fails(Evaluator):
    def __init__(self, config, context): pass
    def evaluate(self, model, step): raise ZeroDivisionError("evaluators may fail")

class NoEvaluation(Fails):
    def evaluate(self, model, step): return {"val/mine": 1.0}

class Odd(Fails):
    def evaluate(self, model, step): return Evaluation({"val/mine": next(model.parameters()).sum()})

class Reserved(Fails):
    def evaluate(self, model, step): return Evaluation({"step": 99.0, "evaluator": 1.0})

class FailsLater(Logger):
    def __init__(self, config, context): self.lines = 0
    def log(self, record):
        self.lines += 1
        if self.lines == 3: raise OSError("the backend is gone")

class FailsAtOnce(FailsLater):
    def __init__(self, config, context): raise OSError("no login")

class FailsToFinish(FailsLater):
    def log(self, record): pass
    def finish(self, status): raise OSError("can't say goodbye")

@hookimpl
def nanochat_register_evaluators(registry):
    for name in ("Fails", "NoEvaluation", "Odd", "Reserved"):
        registry.add(name, config=Config, factory=f"made_up.plugin:{name}", defaults={"at_start": True})

@hookimpl
def nanochat_register_loggers(registry):
    for name in ("FailsLater", "FailsAtOnce", "FailsToFinish"):
        registry.add(name, config=Config, factory=f"made_up.plugin:{name}")
"""


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("evaluators", "Fails", "evaluators may fail"),
        ("evaluators", "NoEvaluation", "NoEvaluation"),
        ("evaluators", "Odd", "val/mine"),
        ("evaluators", "Reserved", "step"),
        ("loggers", "FailsLater", "the backend is gone"),
        ("loggers", "FailsAtOnce", "no login"),
        ("loggers", "FailsToFinish", "can't say goodbye"),
    ],
)
def test_a_broken_evaluator_or_logger_never_takes_a_run_down(
    site: Site, tiny: Path, tmp_path: Path, trained: Trained, kind: str, name: str, words: str
) -> None:
    site.add("made-up", MISBEHAVING)
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", "--set", f"{kind}.{name}.plugin={name}")
    assert result.code == 0, result.err
    run = only_run(tmp_path / "runs")
    assert losses(run) == losses(trained.path)
    assert metrics(run, "val/bpb") == metrics(trained.path, "val/bpb")
    said = [line for line in result.out.splitlines() if name in line]
    assert said
    assert any(words in line for line in said)
    assert len(said) <= 2  # an evaluator at start and end, a logger once
