"""A run that version 0.1.0 made is listed, shown, sampled, evaluated, logged and gone on with.

It was trained with plugins that nanochat ships: bpe, gpt, muon_adamw, bpb, samples, console and csv.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from helpers.support import ROOT, Result, call, ledger, losses, metrics

FIXTURE = ROOT / "tests" / "fixtures" / "run_of_0_1_0"
DATA = ("--set", f"data.path={FIXTURE / 'corpus.txt'}")  # the one that is recorded was on another machine


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run's directory: finished at step 12, with the checkpoint of step 6 only."""
    (made,) = (path.parent for path in FIXTURE.glob("*/experiment.toml"))
    shutil.copytree(made, tmp_path / "runs" / "v010" / made.name)
    return tmp_path / "runs" / "v010" / made.name


def on(run: Path, *arguments: object) -> Result:
    """The command ``arguments``, which succeeds and complains of nothing."""
    result = call(*arguments, "--runs-dir", run.parents[1])
    assert result.code == 0, result.err
    said = (result.out + result.err).lower()
    assert not [
        word for word in ("pip install", "not installed", "nanochat 0.1.0", "warning", "differs") if word in said
    ]
    return result


def test_runs_lists_it(run: Path) -> None:
    (line,) = [line for line in on(run, "runs").out.splitlines() if run.name in line]
    assert "v010" in line
    assert "finished" in line


def test_show_explains_it(run: Path) -> None:
    result = call("show", run / "experiment.toml")
    assert (result.code, result.err) == (0, "")
    assert "model.depth = 2 " in result.out
    assert 'tokenizer.plugin = "bpe" ' in result.out


def test_sample_goes_on_from_a_prompt(run: Path) -> None:
    sampled = on(run, "sample", "v010", "The ", "--max-tokens", 8, "--temperature", 0)
    assert sampled.out.startswith("The ")
    assert len(sampled.out.removesuffix("\n")) > len("The ")


def test_eval_finds_what_was_recorded(run: Path) -> None:
    on(run, "eval", "v010", "--evaluator", "bpb", *DATA)
    facts = json.loads((run / "evaluations" / "bpb_000006" / "evaluation.json").read_text())
    assert facts["metrics"]["val/bpb"] == pytest.approx(metrics(run, "val/bpb")[6], abs=1e-3)


def test_log_sync_knows_what_was_sent_and_sends_it_again(run: Path) -> None:
    count = len(ledger(run))
    assert f"logger csv: 0 records sent, 0 missing, of {count}" in on(run, "log-sync", "v010", "--to", "csv").out
    (run / "loggers" / "csv.json").unlink()
    shutil.rmtree(run / "csv")
    assert f"logger csv: {count} records sent, 0 missing, of {count}" in on(run, "log-sync", "v010", "--to", "csv").out
    with (run / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "train/loss"]
    assert {int(row["step"]): float(row["value"]) for row in rows} == losses(run)


def test_resume_trains_the_same_steps_again(run: Path) -> None:
    before, bpb = losses(run), metrics(run, "val/bpb")
    assert sorted(before) == list(range(12))
    resumed = on(run, "run", run / "experiment.toml", "--resume", *DATA)
    assert "from step_000006" in resumed.out
    assert losses(run) == pytest.approx(before, abs=1e-4)
    assert {step: losses(run)[step] for step in range(6)} == {step: before[step] for step in range(6)}
    assert metrics(run, "val/bpb")[12] == pytest.approx(bpb[12], abs=1e-3)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    checkpoint = run / "checkpoints" / "step_000012"
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 12
