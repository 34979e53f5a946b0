"""What the backends of loggers would refuse is said before a run, and nothing is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.support import Trained, call

from nanochat_core.plugins.discovery import load_plugins

TAG = "x" * 65


@pytest.fixture(autouse=True)
def installed() -> None:
    for name in ("wandb", "tensorboard", "aim"):
        entry = load_plugins()["logger"].get(name)
        if entry is None or entry.missing():
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize(
    ("logger", "options", "reason"),
    [
        ("wandb", [f'run.tags=["{TAG}"]'], "run.tags: wandb wants tags of 1 to 64 characters, not 65"),
        ("wandb", ['run.tags=[""]'], "run.tags: wandb wants tags of 1 to 64 characters, not 0"),
        ("wandb", ["run.project=team/x"], "run.project: wandb wants"),
        ("wandb", ['run.project=""'], "run.project: wandb wants"),
        ("wandb", [f"run.group={TAG * 2}"], "run.group: wandb wants at most 128"),
        ("wandb", ["loggers.wandb.entity=a/b"], "loggers.wandb.entity: must be"),
        ("csv", ["loggers.csv.directory=/dev/null/x"], "loggers.csv.directory: /dev/null is not a directory"),
        ("tensorboard", ["loggers.tensorboard.directory=/dev/null"], "loggers.tensorboard.directory: /dev/null is not"),
        ("aim", ["loggers.aim.repo=/dev/null"], "loggers.aim.repo: /dev/null is not a directory"),
        ("aim", ["loggers.aim.repo=http://x"], "loggers.aim.repo: a server is written as aim://host:port"),
    ],
)
def test_it_is_a_problem_of_the_plan(tiny: Path, tmp_path: Path, logger: str, options: list[str], reason: str) -> None:
    sets = [word for option in (f"loggers.{logger}.plugin={logger}", *options) for word in ("--set", option)]
    result = call("run", tiny, *sets, "--runs-dir", tmp_path / "runs")
    assert result.code == 2
    assert reason in result.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mode", "code"),
    [("oflline", 2), ("Online", 2), ("dryrun", 0), ("run", 0), ("disabled", 0), ("offline", 0), ("shared", 0), ("", 0)],
)
def test_an_unknown_mode_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, mode: str, code: int) -> None:
    from nanochat_core import RunLabels
    from nanochat_wandb.check import check
    from nanochat_wandb.config import WandbConfig

    monkeypatch.setenv("WANDB_MODE", mode)
    problems = list(check(WandbConfig(), RunLabels("a", "b", "", ())))
    assert [key for key, _ in problems] == (["mode"] if code else [])


def test_a_disabled_wandb_writes_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sets = ("--set", "loggers.wandb.plugin=wandb", "--set", "train.num_iterations=2")
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *sets)
    assert result.code == 0, result.err
    assert "logger wandb: writes nothing, because WANDB_MODE is disabled" in result.out
    assert "missed" not in result.out
    assert not list((tmp_path / "runs").rglob("*.wandb"))


def test_log_sync_takes_other_labels(trained: Trained, tmp_path: Path) -> None:
    run = shutil.copytree(trained.path, tmp_path / "runs" / "tiny" / trained.path.name)
    labels = ("--set", "run.project=team/x", "--runs-dir", tmp_path / "runs")
    refused = call("log-sync", run, "--to", "wandb", "--set", "mode=offline", *labels)
    assert refused.code == 2
    assert "run.project: wandb wants" in refused.err
    assert "give another one with --set" in refused.err
    other = call("log-sync", run, "--to", "csv", "--set", f"directory={tmp_path / 'csv'}", *labels)
    assert other.code == 0, other.err
    assert '"project": "team/x"' in next((tmp_path / "csv").rglob("run.json")).read_text()
