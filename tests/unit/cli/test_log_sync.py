"""``nanochat log-sync``: what a logger missed, and runs that never had it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from helpers.support import Trained, call, losses


def sync(trained: Trained, *arguments: object) -> tuple[int, str]:
    run = f"{trained.path.parent.name}/{trained.path.name}"
    result = call("log-sync", run, *arguments, "--runs-dir", trained.runs)
    return result.code, result.out + result.err


def test_a_run_that_never_had_a_logger_is_sent_whole_and_once(trained: Trained, tmp_path: Path) -> None:
    arguments = ("--to", "csv", "--set", f"directory={tmp_path}")
    code, said = sync(trained, *arguments)
    assert code == 0, said
    count = len((trained.path / "metrics.jsonl").read_text().splitlines())
    assert f"logger csv: {count} records sent, 0 missing, of {count}" in said
    for _ in range(2):
        with (tmp_path / "tiny" / trained.path.name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["name"] == "train/loss"]
        assert {int(row["step"]): float(row["value"]) for row in rows} == losses(trained.path)
        assert len(rows) == len(losses(trained.path))
        code, said = sync(trained, *arguments)
        assert code == 0
        assert "0 records sent" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--to", "console"), "shows a run while it is trained"),
        (("--to", "wanbd"), 'no logger plugin "wanbd" is installed (did you mean "wandb"?)'),
        (("--to", "csv", "--set", "dir=x"), "loggers.csv.dir: unknown key"),
    ],
)
def test_what_can_not_be_sent_is_said(trained: Trained, arguments: tuple[str, ...], reason: str) -> None:
    code, said = sync(trained, *arguments)
    assert code == 2
    assert reason in said


def test_another_logger_that_is_not_installed_does_not_matter(trained: Trained, tmp_path: Path) -> None:
    """Neither does one whose name begins with that of the logger."""
    run = shutil.copytree(trained.path, tmp_path / "runs" / "tiny" / trained.path.name)
    text = (run / "experiment.toml").read_text()
    assert text.count("loggers = [") == 1
    text = text.replace("loggers = [", 'loggers = [{ name = "csv_too", plugin = "gone" },')
    (run / "experiment.toml").write_text(text)
    result = call("log-sync", run, "--trust", "--to", "csv", "--set", f"directory={tmp_path / 'csv'}")
    assert result.code == 0, result.err
    assert "0 missing" in result.out


def test_a_run_in_training_is_left_to_its_own_loggers(trained: Trained) -> None:
    from nanochat_core.runs.directory import RunDirectory

    with RunDirectory(trained.path).lock():
        code, said = sync(trained, "--to", "csv")
    assert code == 2
    assert "is being trained" in said
