"""What the core reserves on [data], in whole runs: packing, epochs, cache, threads."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.support import call, ledger, losses, metrics, only_run

BEST_FIT = ("--set", "data.packing=best_fit", "--set", "data.packing_window=4")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def test_best_fit_resumes_to_the_same_losses(tiny: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert call("run", tiny, *BEST_FIT, "--runs-dir", whole).code == 0
    half = ("--set", "train.num_iterations=4", "--set", "schedule.warmdown_ratio=0.0")
    assert call("run", tiny, *BEST_FIT, *half, "--runs-dir", part).code == 0
    assert call("run", tiny, *BEST_FIT, "--resume", "--runs-dir", part).code == 0
    expected = losses(only_run(whole))
    assert losses(only_run(part)) == pytest.approx(expected, abs=0)
    cropped = metrics(only_run(whole), "train/cropped")
    assert set(cropped) == set(range(12))
    assert all(0 < value < 1 for value in cropped.values())


def test_stream_has_no_metric_of_losses(trained) -> None:  # type: ignore[no-untyped-def]
    assert not any("train/cropped" in record for record in ledger(trained.path))


def test_packing_is_pinned(tiny: Path, runs: Path) -> None:
    assert call("run", tiny, "--set", "train.num_iterations=2", "--runs-dir", runs).code == 0
    refused = call("run", tiny, "--resume", *BEST_FIT, "--runs-dir", runs)
    assert refused.code == 2
    assert "data.packing" in refused.err


@pytest.mark.parametrize("threads", [1, 2])
def test_cache_changes_nothing(tiny: Path, trained, runs: Path, threads: int) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2):
        result = call("run", tiny, "--set", "data.cache=true", "--set", f"data.threads={threads}", "--runs-dir", runs)
        assert result.code == 0, result.err
    for run in runs.glob("*/*/"):
        assert losses(run) == losses(trained.path)


def test_epochs_that_are_known_to_be_too_few(tiny: Path, runs: Path) -> None:
    result = call("run", tiny, "--set", "data.epochs=error", "--set", "train.num_iterations=2000", "--runs-dir", runs)
    assert result.code == 2
    assert "--set data.epochs=error: data.epochs: the run needs 512,000 tokens" in result.err
    assert not list(runs.glob("*/*/metrics.jsonl"))


def test_the_end_of_the_data_is_saved_and_can_be_passed(tiny: Path, runs: Path) -> None:
    # 64 documents of about 122 bytes would do for 30 steps of 256 tokens, were they not cropped
    more = (*BEST_FIT, "--set", "train.num_iterations=12", "--set", "checkpoint.save_every=100", "--runs-dir", runs)
    result = call("run", tiny, "--set", "data.epochs=error", *more)
    assert result.code == 2
    assert "the training data are used up after step" in result.err
    steps = len(losses(only_run(runs)))
    assert 4 < steps < 12
    assert [p.name for p in (only_run(runs) / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    result = call("run", tiny, "--resume", "--set", "data.epochs=2", *more)
    assert result.code == 0, result.err
    assert len(losses(only_run(runs))) == 12


def test_training_documents_that_are_all_empty(tiny: Path, tmp_path: Path, runs: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": null}\n' * 20)
    jsonl = ("--set", "data.plugin=jsonl", "--set", f"data.path={tmp_path / 'empty.jsonl'}")
    refused = call("run", tiny, *jsonl, "--runs-dir", runs)
    assert refused.code == 2
    assert "all 38 training documents of data source 'jsonl' are empty" in refused.err


def test_training_and_validation_documents_that_are_the_same(tiny: Path, tmp_path: Path, runs: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"text": "one two three four five six"}\n' * 40)
    options = ("--set", "data.plugin=jsonl", "--set", f"data.path={tmp_path / 'train'}")
    options += ("--set", f"data.val_path={tmp_path / 'val'}")
    assert "the training and the validation data are the same" in call("plan", tiny, *options).out
    done = call("run", tiny, *options, "--set", "train.num_iterations=2", "--runs-dir", runs)
    assert done.code == 0, done.err
    assert "the training and the validation data are the same" in done.out + done.err
