"""Run directories that somebody moves, replaces, deletes or clears while the run trains, and last saves that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.support import Result, Site, Trained, assert_same_end, call, losses, only_run

import nanochat_core.runs.saver
import nanochat_core.training.checkpoints
from nanochat_core.runs.checkpoint import save_checkpoint, verify

# An evaluator that does something to the run's directory, once.
HAVOC = """
import shutil
from pathlib import Path
from nanochat_core import Evaluation, Evaluator

@attrs.frozen
class Do:
    what: str
    runs: str
    at: int

def move(run): run.parent.rename(run.parents[2] / "kept")
def move_and_replace(run):
    move(run)
    (run / "checkpoints").mkdir(parents=True)
    (run / "status.json").write_text("mine")
def copy_back(run):
    shutil.copytree(run, run.parent / "copy")
    shutil.rmtree(run)
    (run.parent / "copy").rename(run)
def delete(run): shutil.rmtree(run)
def delete_all(run): shutil.rmtree(run.parents[1])
def ledger(run): (run / "metrics.jsonl").unlink()
def replace_ledger(run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").write_text("mine")
def clear(run):
    for path in list(run.iterdir()):
        if path.name in ("metrics.jsonl", "status.json", "lock", "log.txt"): path.unlink()
        elif path.name in ("checkpoints", "samples", "loggers"): shutil.rmtree(path)

class Havoc(Evaluator):
    def __init__(self, config, context): self.config = config
    def evaluate(self, model, step):
        if step == self.config.at:
            (run,) = Path(self.config.runs).glob("*/*")
            globals()[self.config.what](run)
        return Evaluation({"val/x": 1.0})

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("havoc", config=Do, factory="made_up.plugin:Havoc")
"""


@pytest.fixture
def suffer(site: Site, tiny: Path, tmp_path: Path) -> Callable[..., Result]:
    """Train with an evaluator that does ``what`` after step ``at``."""
    site.add("made-up", HAVOC)

    def run(what: str, at: int, *more: str) -> Result:
        settings = (
            "evaluators.havoc.plugin=havoc",
            f"evaluators.havoc.what={what}",
            f"evaluators.havoc.runs={tmp_path / 'runs'}",
            f"evaluators.havoc.at={at}",
            "evaluators.havoc.every=1",
            *more,
        )
        return call("run", tiny, "--runs-dir", tmp_path / "runs", *(word for s in settings for word in ("--set", s)))

    return run


def status(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["status"])


def resumed_to_the_end(run: Path, tiny: Path, trained: Trained) -> None:
    """It is resumed where it is, to the same end."""
    result = call("run", tiny, "--runs-dir", run.parents[1], "--resume", run)
    assert result.code == 0, result.err
    assert_same_end(run, trained.path)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize(("what", "at"), [("move", 5), ("move", 12), ("move_and_replace", 8)])
def test_a_run_whose_directory_is_moved_is_saved_there(
    suffer: Callable[..., Result], tiny: Path, tmp_path: Path, trained: Trained, what: str, at: int, asynchronous: str
) -> None:
    result = suffer(what, at, f"checkpoint.asynchronous={asynchronous}")
    assert result.code == 5, result.err
    (run,) = (tmp_path / "kept").iterdir()
    assert f"was moved to {run} while the run was training in it" in result.err
    assert "Next:" not in result.out
    last = min(at + 1, 12)
    assert verify(run / f"checkpoints/step_{last:06d}") == ""
    assert status(run) == "failed"
    assert list(losses(run)) == list(range(last))
    old = tmp_path / "runs" / "tiny" / run.name
    if what == "move":
        assert not old.exists()
    else:  # what is there now is somebody else's
        assert (old / "status.json").read_text() == "mine"
        assert sorted(p.name for p in old.rglob("*")) == ["checkpoints", "status.json"]
    resumed_to_the_end(run, tiny, trained)


@pytest.mark.parametrize(("what", "at"), [("delete", 5), ("delete_all", 8), ("copy_back", 5), ("delete", 12)])
def test_a_run_whose_directory_is_deleted_is_saved_beside_it(
    suffer: Callable[..., Result], tiny: Path, tmp_path: Path, trained: Trained, what: str, at: int
) -> None:
    result = suffer(what, at)
    assert result.code == 5, result.err
    (run,) = (tmp_path / "runs" / "tiny").glob("*-rescued")
    why = "was replaced by another" if what == "copy_back" else "was deleted"
    assert f"{why} while the run was training in it: it goes to {run}" in result.err
    assert verify(run / f"checkpoints/step_{min(at + 1, 12):06d}") == ""
    assert status(run) == "failed"
    assert "the run is saved there, and stops" in (run / "log.txt").read_text()
    resumed_to_the_end(run, tiny, trained)


@pytest.mark.parametrize("what", ["ledger", "replace_ledger", "clear"])
@pytest.mark.parametrize("at", [5, 12])
def test_a_finished_run_is_there_whatever_is_missing_in_it(
    suffer: Callable[..., Result], tmp_path: Path, trained: Trained, what: str, at: int
) -> None:
    result = suffer(what, at)
    assert result.code == 0, result.err
    run = only_run(tmp_path / "runs")
    assert status(run) == "finished"
    assert "it is written anew" in result.out
    assert_same_end(run, trained.path)
    if what == "replace_ledger":
        (theirs,) = run.glob("metrics.replaced-*.jsonl")
        assert theirs.read_text() == "mine"


# ----------------------------------------------------------------------------------------------- last saves that fail


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanochat_core.training.checkpoints, "PAUSES", (0.0, 0.0, 0.0))


FAILING = """
import errno
from nanochat_core import Evaluation, Evaluator
import nanochat_core.runs.checkpoint as checkpoint
import nanochat_core.runs.saver as saver

@attrs.frozen
class Times:
    saves: int  # after which saving fails
    failures: int  # after which it works again
    truncate: bool = False  # it fails without a word

real, calls = saver.save_checkpoint, [0]

class Fails(Evaluator):
    def __init__(self, config, context):
        calls[0] = 0
        def fail(directory, content):
            calls[0] += 1
            bad = config.saves < calls[0] <= config.saves + config.failures
            if bad and not config.truncate:
                raise checkpoint.CheckpointError("no room in the test")
            path = real(directory, content)
            if bad:
                with (path / "model.safetensors").open("r+b") as file: file.truncate(100)
            return path
        saver.save_checkpoint = fail
    def evaluate(self, model, step): return Evaluation({"val/x": 1.0})

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("fails", config=Times, factory="made_up.plugin:Fails")
"""


@pytest.fixture
def fail(site: Site, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    site.add("made-up", FAILING)
    monkeypatch.setattr(nanochat_core.runs.saver, "save_checkpoint", save_checkpoint)

    def run(saves: int, failures: int, *more: str) -> Result:
        settings = (
            "evaluators.fails.plugin=fails", f"evaluators.fails.saves={saves}", f"evaluators.fails.failures={failures}",
            *more,
        )  # fmt: skip
        return call("run", tiny, "--runs-dir", tmp_path / "runs", *(word for s in settings for word in ("--set", s)))

    return run


@pytest.mark.parametrize("truncate", ["false", "true"])
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_last_save_that_fails_is_tried_again(
    fail: Callable[..., Result], at_once: None, tmp_path: Path, trained: Trained, asynchronous: str, truncate: str
) -> None:
    result = fail(2, 2, f"checkpoint.asynchronous={asynchronous}", f"evaluators.fails.truncate={truncate}")
    assert result.code == 0, result.err
    run = only_run(tmp_path / "runs")
    assert status(run) == "finished"
    assert_same_end(run, trained.path)
    assert verify(run / "checkpoints/step_000012") == ""


@pytest.mark.parametrize("truncate", ["false", "true"])
@pytest.mark.parametrize("saves", [0, 2])
def test_a_run_without_its_last_checkpoint_is_not_finished(
    fail: Callable[..., Result], at_once: None, tiny: Path, tmp_path: Path, trained: Trained, saves: int, truncate: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    result = fail(saves, 99, f"evaluators.fails.truncate={truncate}")
    assert result.code == 6, result.err
    run = only_run(tmp_path / "runs")
    assert "training has ended, but step 12 could not be saved" in result.err
    assert "Next:" not in result.out
    assert status(run) == "failed"
    assert list(losses(run)) == list(range(12))
    monkeypatch.setattr(nanochat_core.runs.saver, "save_checkpoint", save_checkpoint)  # there is room again
    if saves:
        resumed_to_the_end(run, tiny, trained)
