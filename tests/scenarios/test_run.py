"""A run directory explains itself; evaluations and saves change nothing of the training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from helpers.support import Trained, call, ledger, losses, metrics, only_run

from nanochat_core.config.load import load
from nanochat_core.plugins.discovery import load_plugins

METRICS = {
    "train/loss", "train/lrm", "train/dt", "train/tok_per_sec", "train/mfu", "train/grad_norm", "train/epoch",
    "train/data_wait", "train/peak_memory", "total_training_flops", "total_training_time",
}  # fmt: skip


def test_it_learns_and_says_so(trained: Trained) -> None:
    found = losses(trained.path)
    assert found[11] < found[0] - 1
    bpb = metrics(trained.path, "val/bpb")
    assert bpb[12] < bpb[8] < bpb[4] < bpb[0]
    for words in (
        "Step 00012 | Validation bpb",
        "step 00011/00012",
        f"The run is in {trained.path}",
        "nanochat sample",
    ):
        assert words in trained.result.out
    assert trained.result.err == ""


def test_what_a_run_directory_holds(trained: Trained) -> None:
    names = {p.name for p in trained.path.iterdir()}
    assert names >= {
        "experiment.toml",
        "provenance.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "tokenizer",
        "log.txt",
    }
    assert sorted(p.name for p in (trained.path / "checkpoints").iterdir()) == [
        "step_000004",
        "step_000008",
        "step_000012",
    ]
    assert "Validation bpb" not in (trained.path / "metrics.jsonl").read_text()
    assert "vocab size" in (trained.path / "log.txt").read_text()


def test_the_ledger_has_every_step_on_flat_lines(trained: Trained) -> None:
    records = ledger(trained.path)
    for record in records:
        assert list(record)[:2] == ["step", "time"]
        assert all(isinstance(value, int | float | str) for value in record.values())
    assert list(losses(trained.path)) == list(range(12))
    steps = [record for record in records if "train/loss" in record]
    for record in steps:
        assert record.keys() >= METRICS
    times = [record["time"] for record in records]
    assert times == sorted(times)
    assert time.time() - 3600 < times[0] < time.time()
    assert [record["train/lrm"] for record in steps] == [1] * 11 + [0.5]
    flops = steps[-1]["total_training_flops"]
    assert flops == pytest.approx(12 * steps[0]["total_training_flops"])
    assert list(metrics(trained.path, "val/bpb")) == [0, 4, 8, 12]


def test_samples_are_kept_for_people(trained: Trained) -> None:
    (file,) = (trained.path / "samples").iterdir()
    texts = json.loads(file.read_text())
    assert file.name == "samples_000012.json"
    assert len(texts) == 2
    assert any("one, " in part for pair in texts.items() for part in pair)


def test_provenance_explains_every_value(trained: Trained) -> None:
    facts = json.loads((trained.path / "provenance.json").read_text())
    assert facts["origins"]["model.depth"] == f"{trained.file}:14"
    assert facts["origins"]["train.grad_clip"] == "default"
    assert set(facts["fingerprints"]) == {"tokenizer", "train", "val"}
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["plugins"]["nanochat-core"]
    assert facts["plan"]["num_iterations"] == 12
    assert 0 < facts["plan"]["relative_data"] < 1  # of depth 1, over depth 12
    assert facts["python"]
    assert facts["machine"]


def test_the_resolved_experiment_is_the_same_experiment(trained: Trained) -> None:
    plugins = load_plugins()
    resolved = load(trained.path / "experiment.toml", (), plugins).require_all().experiment
    written = load(trained.file, (), plugins).experiment
    assert "auto" not in {resolved.train.dtype, resolved.train.compile, resolved.train.total_batch_size}
    assert resolved.train == written.train  # tiny leaves none of them to auto
    assert resolved.model.plugin == written.model.plugin
    assert resolved.run == written.run


def test_the_resolved_experiment_gives_the_same_run(trained: Trained, tmp_path: Path) -> None:
    result = call("run", trained.path / "experiment.toml", "--runs-dir", tmp_path)
    assert result.code == 0, result.err
    again = only_run(tmp_path)
    assert again.parent.name == "tiny"
    assert losses(again) == losses(trained.path)
    assert metrics(again, "val/bpb") == metrics(trained.path, "val/bpb")


def test_two_runs_do_not_share_a_directory(tiny: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert call("run", tiny, "--runs-dir", tmp_path / "runs", "--set", "train.num_iterations=1").code == 0
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 2


def train(file: Path, runs: Path, *settings: str) -> Path:
    result = call("run", file, "--runs-dir", runs, *(word for s in settings for word in ("--set", s)))
    assert result.code == 0, result.err
    return only_run(runs)


def test_training_does_not_notice_evaluations_and_saves(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    quiet = ("evaluators.bpb.remove=true", "evaluators.samples.remove=true", "checkpoint.save_every=100")
    run = train(tiny, tmp_path / "runs", *quiet)
    assert losses(run) == losses(trained.path)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000012"]  # the end is always saved


def test_when_evaluations_are_due(tiny: Path, tmp_path: Path) -> None:
    run = train(
        tiny,
        tmp_path / "runs",
        "evaluators.bpb.every=5",
        "evaluators.bpb.at_start=false",
        "evaluators.bpb.at_end=false",
        "evaluators.second.plugin=bpb",
        "evaluators.second.every=0",
        "evaluators.second.eval_tokens=512",
    )
    assert list(metrics(run, "val/bpb")) == [5, 10]
    assert list(metrics(run, "second/val/bpb")) == [0, 12]  # an entry's name leads its metrics


def test_starting_from_the_weights_of_another_run(trained: Trained, tmp_path: Path) -> None:
    again = ("--set", "run.name=second", "--set", "train.num_iterations=2")
    result = call("run", trained.file, "--runs-dir", tmp_path, *again, "--set", f"train.init_from={trained.path}")
    assert result.code == 0, result.err
    second = only_run(tmp_path)
    assert metrics(second, "val/bpb")[0] == metrics(trained.path, "val/bpb")[12]
    assert losses(second)[0] < losses(trained.path)[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("train.init_from=nothing",), "no run 'nothing'"),
        (("model.depth=2",), "does not fit the model"),
        (("tokenizer.plugin=bpe", "tokenizer.vocab_size=270"), "the tokenizer of"),
    ],
)
def test_weights_that_do_not_fit(trained: Trained, tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    settings = [f"train.init_from={trained.path}", *more]
    result = call("run", trained.file, "--runs-dir", tmp_path / "runs", *(w for s in settings for w in ("--set", s)))
    assert result.code == 2
    assert words in result.err
    assert not (tmp_path / "runs").exists()
