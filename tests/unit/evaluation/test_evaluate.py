"""Evaluations that training does not notice, and ranks that fail without leaving others waiting."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.ranks import on_ranks
from helpers.support import ROOT, Site, call, ledger, losses, only_run, write_experiment

from nanochat_core import Evaluation, Evaluator, Model, World
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.evaluation.evaluate import EvaluationFailed, evaluate, inference
from nanochat_core.evaluation.results import markdown, read_evaluation, write_evaluation
from nanochat_core.plugins.choice import Choice, EvaluatorKeys

CPU = torch.device("cpu")


class Tiny(Model):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = self.hidden_size = 2
        self.first = torch.nn.Linear(2, 2)
        self.second = torch.nn.Linear(2, 2)

    def hidden(self, ids_BT, cache=None):
        return self.first(torch.nn.functional.one_hot(ids_BT, 2).float())

    def logits(self, hidden_ND):
        return self.second(hidden_ND)


def fail_inside(model: Tiny) -> None:
    with inference(model, torch.float32):
        assert not model.first.training
        assert not torch.is_grad_enabled()
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError("in the middle")


def test_mode_and_random_generators_are_restored():
    model = Tiny()
    model.train()
    model.second.eval()  # a part that somebody froze
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    with pytest.raises(RuntimeError, match="in the middle"):
        fail_inside(model)
    assert model.training
    assert model.first.training
    assert not model.second.training
    assert torch.is_grad_enabled()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


NOISY = """
import random, numpy, torch
from nanochat_core import Evaluation, Evaluator, score_choices
from nanochat_core.evaluation.spans import token_spans
class Noisy(Evaluator):
    def __init__(self, config, context): self.context = context
    def evaluate(self, model, step):
        torch.rand(100), numpy.random.rand(3), random.random()
        rows = [[0, *range(1, n), n] for n in range(5, 40)]
        score_choices(model, [token_spans([numpy.array(r), numpy.array([*r[:-1], 3])]) for r in rows], self.context)
        model.eval()
        return Evaluation({"noise": torch.rand(1).item()})
@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("noisy", config=Config, factory="noisy_package.plugin:Noisy")
"""


def test_training_does_not_notice_evaluations(tmp_path, shards, site: Site):
    site.add("noisy-package", NOISY, "noisy")
    more = '\n[[evaluators]]\nplugin = "noisy"\nevery = 2\nat_start = true\n'
    without = write_experiment(tmp_path / "without.toml", shards)
    changes = [
        "--set",
        "train.num_iterations=5",
        "--set",
        "evaluators.bpb.every=0",
        "--set",
        "evaluators.bpb.at_end=false",
    ]
    changes += ["--set", "evaluators.bpb.at_start=false", "--set", "evaluators.samples.at_end=false"]
    assert call("run", without, "--runs-dir", tmp_path / "a", *changes).code == 0
    with_them = write_experiment(tmp_path / "with.toml", shards, more)
    assert call("run", with_them, "--runs-dir", tmp_path / "b", "--set", "train.num_iterations=5").code == 0
    assert losses(only_run(tmp_path / "a")) == losses(only_run(tmp_path / "b"))
    assert sum("noise" in record for record in ledger(only_run(tmp_path / "b"))) == 4


def test_evaluations_do_not_compile_training_anew():
    """Shapes change all the time in an evaluation, and the compiled training step is left alone."""
    from nanochat_core import ModelContext, score_choices
    from nanochat_core.evaluation.spans import token_spans
    from nanochat_core.plugins.discovery import load_plugins

    entry = load_plugins()["model"].get("gpt")
    assert entry is not None
    config = entry.config(depth=1, aspect_ratio=16, head_dim=16)
    model = entry.load()(config, ModelContext(30, 16, CPU, torch.float32))
    model.compile_training(backend="eager")
    ids_BT = torch.arange(32).view(2, 16) % 30

    def step() -> float:
        loss = model(ids_BT, ids_BT)
        loss.backward()
        return float(loss.detach())

    model.train()
    first = step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (5, 9, 30):
            with inference(model, torch.float32):
                score_choices(model, [token_spans([np.arange(n), np.array([*range(n - 1), 0])])])
                model(ids_BT[:1, :n], ids_BT[:1, :n])
            assert step() == first


# --------------------------------------------------------------------------------------------- ranks that may fail


class Scripted(Evaluator):
    """Does what its script says on this rank."""

    def __init__(self, world: EvaluationWorld, script: list[str]) -> None:
        self.world, self.script = world, script

    def evaluate(self, model: Model, step: int) -> Evaluation:
        total = 0.0
        for word in self.script:
            match word:
                case "sum":
                    total += self.world.sum([1.0])[0]
                case "all_gather_object":
                    total += len(self.world.all_gather_object(word))
                case "unsendable":
                    self.world.all_gather_object(lambda: 0)
                case "raise":
                    raise ValueError("boom")
                case "swallow":
                    try:
                        self.world.sum([1.0])
                    except Exception:
                        total = -1.0
        return Evaluation({"total": total})


def choice(**keys: Any) -> Choice:
    return Choice(EvaluatorKeys(plugin="scripted", name="scripted", **keys), None, None)


DIFFERENT = "on rank 0: ranks were at different points of the evaluation: every rank must call the same collectives"
CASES: list[tuple[list[list[str]], str]] = [
    ([["sum"], ["sum"]], "2.0"),
    ([["sum", "raise"], ["sum", "sum"]], "on rank 0: ValueError: boom"),
    ([["sum"], ["raise"]], "on rank 1: ValueError: boom"),
    ([[], ["raise"]], "on rank 1: ValueError: boom"),
    ([["raise"], ["raise"]], "on rank 0: ValueError: boom"),
    ([["sum"], ["all_gather_object"]], DIFFERENT),
    ([["sum", "sum"], ["sum"]], DIFFERENT),
    ([["swallow", "sum", "all_gather_object"], ["raise"]], "on rank 1: ValueError: boom"),
    ([["unsendable"], ["all_gather_object"]], "on rank 0: TypeError: all_gather_object can't pickle a function"),
    ([["all_gather_object", "sum"], ["all_gather_object", "sum"]], "4.0"),
]


def _ranks(world: World) -> list[str]:
    """Outcomes of the cases on this rank, one after the other."""
    guarded = EvaluationWorld.of(world)
    found = []
    for scripts, _ in CASES:
        try:
            evaluation = evaluate(choice(), Scripted(guarded, scripts[world.rank]), Tiny(), torch.float32, 0, guarded)
            found.append(str(evaluation.metrics["total"]))
        except EvaluationFailed as error:
            found.append(re.split(r" \(|(?<=a function): ", str(error))[0])
    return [*found, str(world.sum([1.0])[0])]  # and the run goes on


@pytest.mark.xdist_group("ranks")
def test_a_rank_that_fails_cancels_the_evaluation_everywhere():
    assert on_ranks(2, _ranks) == [[*(outcome for _, outcome in CASES), "2.0"]] * 2


def test_one_rank_that_fails():
    guarded = EvaluationWorld(0, 1, CPU)
    with pytest.raises(EvaluationFailed, match=r"^ValueError: boom \(.*test_evaluate.py:\d+\)$"):
        evaluate(choice(), Scripted(guarded, ["raise"]), Tiny(), torch.float32, 0, guarded)


def test_time_budget_starts_with_the_evaluation():
    guarded = EvaluationWorld(0, 1, CPU)
    left = []

    class Looks(Evaluator):
        def evaluate(self, model: Model, step: int) -> Evaluation:
            left.append(guarded.time_left())
            return Evaluation()

    evaluate(choice(time_budget=50.0), Looks(), Tiny(), torch.float32, 0, guarded)
    evaluate(choice(), Looks(), Tiny(), torch.float32, 0, guarded)
    assert 49 < left[0] <= 50
    assert left[1] == float("inf")


# -------------------------------------------------------------------------------------------------------- on disk


def made(right: dict[str, list[float]], baseline: float = 0.5) -> Evaluation:
    rows = [
        {
            "task": task,
            "example": f"{i // 2}",
            "value": value,
            "centered": (value - baseline) / (1 - baseline),
            "odd": [i],
        }
        for task, values in right.items()
        for i, value in enumerate(values)
    ]
    return Evaluation(metrics={"m": 1.5}, examples=rows, files={"t.csv": "a,b\n"}, facts={"x": 1}, notes=("well",))


def test_written_and_read(tmp_path: Path):
    right = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 1.0]}
    path = write_evaluation(tmp_path, "core", 12, made(right), {"ranks": 2})
    assert path.name == "core_000012"
    assert sorted(p.name for p in path.iterdir()) == ["evaluation.json", "examples.parquet", "t.csv", "table.md"]
    assert pq.read_table(path / "examples.parquet").num_rows == 6
    stored = read_evaluation(path)
    assert stored.metrics == {"m": 1.5}
    assert stored.values["a"] == {"0/1": 1.0, "0/2": 0.0, "1/1": 1.0, "1/2": 1.0}
    assert json.loads((path / "evaluation.json").read_text())["ranks"] == 2
    write_evaluation(tmp_path, "core", 12, Evaluation({"m": 2.0}))
    assert not (path / "examples.parquet").exists()
    assert read_evaluation(path).values == {}


def test_table_has_scores_and_intervals():
    table = markdown(made({"a": [1.0] * 30 + [0.0] * 10, "b": [1.0] * 40}))
    a, b, mean = table.splitlines()[2:]
    cells = [cell.strip() for cell in a.split("|")]
    assert cells[1:4] == ["a", "40", "0.7500"]
    low, high = map(float, cells[4].split(" to "))
    assert 0.55 < low < 0.68 < 0.82 < high < 0.95  # a standard error is 0.068
    assert cells[5] == "0.5000"
    assert [float(x) for x in cells[6].split(" to ")] == pytest.approx([2 * low - 1, 2 * high - 1], abs=1e-3)
    assert "1.0000 to 1.0000" in b
    assert "0.7500" in mean  # of 0.5 and 1


def test_the_evaluator_of_the_docs_works(tmp_path, trained, site: Site):
    """The two files in docs/evaluation.md, as they stand there."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    plugin, evaluator = (
        re.search(rf"```python\n# my_quiz/{name}\.py\n(.*?)```", text, re.S)[1]  # type: ignore[index]
        for name in ("plugin", "evaluator")
    )
    assert len([line for line in evaluator.splitlines() if line.strip()]) < 30
    site.add("my-quiz", plugin, "quiz")
    (site.directory / "my_quiz" / "evaluator.py").write_text(evaluator)
    rows = [
        {"question": "one, two, three,", "answers": [" zzzz", "four"], "right": 1},
        {"question": "six, seven,", "answers": ["eight", "qqqqq"], "right": 0},
    ]
    (tmp_path / "quiz.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    shutil.copytree(trained.runs, tmp_path / "runs")
    chosen = ["--evaluator", "quiz", "--set", f"evaluators.quiz.file={tmp_path / 'quiz.jsonl'}"]
    result = call("eval", "tiny", "--runs-dir", tmp_path / "runs", *chosen)
    assert result.code == 0, result.err
    assert "| quiz | 2 | 1.0000 |" in result.out
    assert "quiz/accuracy: 1" in result.out
