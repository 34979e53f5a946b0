"""A run directory explains itself; a run that stops goes on to the same result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.support import Site, Trained, call, ledger, losses, metrics, only_run, write_shards
from safetensors.torch import load_file

from nanochat_core.config.load import load
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.runs.checkpoint import load_state
from nanochat_core.runs.directory import RunDirectory

METRICS = {
    "train/loss", "train/lrm", "train/dt", "train/tok_per_sec", "train/mfu", "train/grad_norm", "train/epoch",
    "train/data_wait", "train/peak_memory", "total_training_flops", "total_training_time",
}  # fmt: skip


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Trained:
    """The finished run, to be changed."""
    shutil.copytree(trained.runs, tmp_path / "runs")
    return Trained(trained.file, tmp_path / "runs", only_run(tmp_path / "runs"), trained.result)


def forget(run: Path, after: int) -> None:
    """As if the run had been killed before the checkpoints after step ``after`` were made."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > after:
            shutil.rmtree(checkpoint)


def resume(run: Trained, *more: str, what: str = "newest"):  # type: ignore[no-untyped-def]
    arguments = ["--resume"] if what == "newest" else ["--resume", what]
    return call("run", run.file, "--runs-dir", run.runs, *arguments, *more)


# ------------------------------------------------------------------------------------------------- the run directory


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


# ---------------------------------------------------------------------------------------------------------- resuming


def test_a_resumed_run_reaches_the_same_numbers_bit_for_bit(copy: Trained, trained: Trained) -> None:
    forget(copy.path, after=4)
    result = resume(copy)
    assert result.code == 0, result.err
    assert "step_000004" in result.out
    assert losses(copy.path) == losses(trained.path)
    assert metrics(copy.path, "val/bpb") == metrics(trained.path, "val/bpb")
    for name in ("model", "optimizer"):
        ours, theirs = (
            load_file(p / "checkpoints/step_000012" / f"{name}.safetensors") for p in (copy.path, trained.path)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_was_taken_back_is_kept_aside(copy: Trained, trained: Trained) -> None:
    before = (trained.path / "metrics.jsonl").read_text().splitlines()
    forget(copy.path, after=4)
    resume(copy)
    rewound = (copy.path / "metrics.rewound.jsonl").read_text().splitlines()
    after = (copy.path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in after if line in before]
    assert rewound == before[len(kept) :]
    assert json.loads(kept[-1])["val/bpb"] == metrics(trained.path, "val/bpb")[4]  # seen at step 4, not again


def test_an_evaluation_that_was_not_reached_is_made_up_for(copy: Trained, trained: Trained) -> None:
    """Killed between the checkpoint of step 4 and the evaluation of step 4."""
    forget(copy.path, after=4)
    file = copy.path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 4 and "val/bpb" in line)
    file.write_text("".join(lines[:last]))
    resume(copy)
    assert metrics(copy.path, "val/bpb") == metrics(trained.path, "val/bpb")
    assert losses(copy.path) == losses(trained.path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy: Trained, trained: Trained) -> None:
    forget(copy.path, after=8)
    damaged = copy.path / "checkpoints/step_000008/optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    result = resume(copy)
    assert result.code == 0
    assert "step_000008: optimizer.safetensors is damaged" in result.err
    assert "from step_000004" in result.out
    assert losses(copy.path) == losses(trained.path)
    assert metrics(copy.path, "val/bpb") == metrics(trained.path, "val/bpb")


def test_auto_starts_fresh_when_there_is_nothing_and_then_goes_on(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    runs = tmp_path / "runs"
    first = call("run", tiny, "--runs-dir", runs, "--resume", "auto", "--set", "train.num_iterations=4")
    assert first.code == 0, first.err
    assert "fresh" in first.out
    second = call("run", tiny, "--runs-dir", runs, "--resume", "auto")
    assert second.code == 0, second.err
    found = losses(only_run(runs))
    assert list(found) == list(range(12))
    expected = losses(trained.path)
    assert [found[i] for i in range(3)] == [expected[i] for i in range(3)]  # before the shorter run's warmdown


def test_resume_without_a_run_says_so(tiny: Path, tmp_path: Path) -> None:
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", "--resume")
    assert result.code == 2
    assert "no run of 'tiny'" in result.err
    assert not (tmp_path / "runs").exists()
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", "--resume", "nothing")
    assert result.code == 2
    assert "no run 'nothing'" in result.err


@pytest.mark.parametrize("reference", ["id", "name/id", "path"])
def test_a_run_may_be_named(copy: Trained, reference: str) -> None:
    forget(copy.path, after=8)
    run = {"id": copy.path.name, "name/id": f"tiny/{copy.path.name}", "path": str(copy.path)}[reference]
    result = resume(copy, what=run)
    assert result.code == 0, result.err
    assert list(losses(copy.path)) == list(range(12))


def test_resume_does_not_swallow_the_file(copy: Trained) -> None:
    result = call("run", "--runs-dir", copy.runs, "--resume", copy.file)
    assert result.code == 2
    assert "tiny.toml is an experiment, not a run: write it before --resume" in result.err


def test_a_finished_run_has_nothing_to_do(copy: Trained) -> None:
    before = (copy.path / "metrics.jsonl").read_bytes()
    result = resume(copy)
    assert result.code == 0
    assert "already at step 12 of 12: nothing to do" in result.out
    assert (copy.path / "metrics.jsonl").read_bytes() == before


def test_a_longer_horizon_goes_on_and_says_what_the_schedule_does(copy: Trained) -> None:
    result = resume(copy, "--set", "train.num_iterations=20")
    assert result.code == 0, result.err
    assert "the horizon was 12 steps, is 20" in result.out
    assert "from 0.500 at step 11 to 1.000 at step 12, and falls from step 16" in result.out
    assert list(losses(copy.path)) == list(range(20))
    assert list(metrics(copy.path, "val/bpb")) == [0, 4, 8, 12, 16, 20]
    facts = json.loads((copy.path / "provenance.json").read_text())
    assert facts["plan"]["num_iterations"] == 20
    assert [earlier["plan"]["num_iterations"] for earlier in facts["earlier"]] == [12]
    assert losses(copy.path)[19] < losses(copy.path)[11]


@pytest.mark.parametrize(
    "change",
    [
        "model.depth=2",
        "model.softcap=0",
        "train.max_seq_len=16",
        "train.total_batch_size=512",
        "train.seed=3",
        "train.dtype=bfloat16",
        "optimizer.plugin=adamw",
        "tokenizer.plugin=bpe",
        "data.plugin=python_docs",
        "train.init_from=x",
    ],
)
def test_changes_that_make_it_another_run_are_refused(copy: Trained, change: str) -> None:
    forget(copy.path, after=8)
    before = (copy.path / "experiment.toml").read_bytes()
    result = resume(copy, "--set", change)
    assert result.code == 2
    key = change.partition("=")[0]
    assert f"--set {change}: {key}: was " in result.err
    assert "can't change it" in result.err
    assert (copy.path / "experiment.toml").read_bytes() == before


def test_the_way_out_that_a_refusal_names_works(copy: Trained) -> None:
    forget(copy.path, after=8)
    result = resume(copy, "--set", "model.softcap=7")
    keep = result.err.split("--set '")[1].split("'")[0]
    assert resume(copy, "--set", "model.softcap=7", "--set", keep).code == 0


def test_changes_that_alter_the_training_are_named(copy: Trained) -> None:
    forget(copy.path, after=8)
    result = resume(copy, "--set", "optimizer.matrix_lr=0.01", "--set", "train.grad_clip=0.5")
    assert result.code == 0, result.err
    assert "changed on resume: optimizer.matrix_lr was 0.02, is 0.01" in result.out
    assert "changed on resume: train.grad_clip was 1.0, is 0.5" in result.out


def test_changes_that_do_not_are_free(copy: Trained, trained: Trained) -> None:
    forget(copy.path, after=8)
    changes = ("train.device_batch_size=8", "checkpoint.save_every=100", "evaluators.bpb.every=100", "run.group=g")
    result = resume(copy, *(word for change in changes for word in ("--set", change)))
    assert result.code == 0, result.err
    assert "changed on resume" not in result.out
    assert losses(copy.path) == pytest.approx(losses(trained.path), rel=1e-3)  # sums in another order


@pytest.fixture
def elsewhere(copy: Trained, shards: Path, tmp_path: Path) -> Path:
    """A copy of the data. The run has gone as far as step 8."""
    forget(copy.path, after=8)
    return shutil.copytree(shards, tmp_path / "data")


def test_data_may_move(copy: Trained, trained: Trained, elsewhere: Path) -> None:
    assert resume(copy, "--set", f"data.path={elsewhere}").code == 0
    assert losses(copy.path) == losses(trained.path)


def test_other_data_are_refused_unless_they_are_allowed(copy: Trained, trained: Trained, elsewhere: Path) -> None:
    before = load_state(copy.path / "checkpoints" / "step_000008")
    provenance = (copy.path / "provenance.json").read_text()
    assert before.fingerprints == json.loads(provenance)["fingerprints"]
    write_shards(elsewhere, train=40)  # which also has another validation set
    there = ("--set", f"data.path={elsewhere}")
    refused = resume(copy, *there)
    assert refused.code == 2
    assert "the train data differ from those it was trained with" in refused.err
    assert "--allow-other-data" in refused.err
    assert (copy.path / "provenance.json").read_text() == provenance

    allowed = resume(copy, *there, "--allow-other-data")
    assert allowed.code == 0, allowed.err
    said = "allowed: from step 8 on the train data differ from those it was trained with"
    assert said in allowed.out
    assert said in (copy.path / "log.txt").read_text()
    after = load_state(copy.path / "checkpoints" / "step_000012")
    facts = json.loads((copy.path / "provenance.json").read_text())
    was = {split: before.fingerprints[split] for split in ("train", "val")}
    assert facts["other_data"] == {"from_step": 8, "before": was}
    assert facts["fingerprints"] == after.fingerprints
    assert not set(was.values()) & set(after.fingerprints.values())
    found, expected = losses(copy.path), losses(trained.path)
    assert {step for step in expected if found[step] != expected[step]} == {8, 9, 10, 11}
    epochs = {r["step"]: r["train/epoch"] for r in ledger(copy.path) if "train/epoch" in r}
    assert epochs[8] < epochs[7]  # from the start of the new data

    # The checkpoint says what it was trained on, whatever a later attempt has noted in the run's directory.
    forget(copy.path, after=8)
    assert "the train data differ from those" in resume(copy, *there).err


def test_another_validation_set_alone_leaves_training_as_it_is(
    copy: Trained, trained: Trained, elsewhere: Path
) -> None:
    shutil.copy(elsewhere / "shard_00001.parquet", elsewhere / "shard_00002.parquet")
    (elsewhere / "shard_00001.parquet").unlink()
    started = time.time()
    allowed = resume(copy, "--set", f"data.path={elsewhere}", "--allow-other-data")
    assert allowed.code == 0, allowed.err
    assert "from step 8 on the val data are not those" in allowed.out
    assert losses(copy.path) == losses(trained.path)
    # What was found on the old set, step 8 included, does not count in the list of runs, whatever comes later.
    records = [{**r, "val/bpb": 0.5} if "val/bpb" in r and r["time"] < started else r for r in ledger(copy.path)]
    (copy.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [r["step"] for r in records if r.get("val/bpb") == 0.5] == [0, 4, 8]
    assert resume(copy, "--set", f"data.path={elsewhere}").code == 0
    best = min(r["val/bpb"] for r in records if "val/bpb" in r and r["time"] > started)
    assert f"  {best:.4f}  " in call("runs", "--runs-dir", copy.runs).out


def test_another_tokenizer_is_never_allowed(copy: Trained) -> None:
    forget(copy.path, after=8)
    checkpoint = copy.path / "checkpoints" / "step_000008"
    state = json.loads((checkpoint / "state.json").read_text())
    text = json.dumps({**state, "fingerprints": {**state["fingerprints"], "tokenizer": "another"}})
    (checkpoint / "state.json").write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(text.encode()), "sha256": digest}
    unsigned = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    result = resume(copy, "--allow-other-data")
    assert result.code == 2
    assert "so the weights do not fit" in result.err


def test_allowing_other_data_is_for_resumed_runs(tiny: Path, tmp_path: Path) -> None:
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", "--allow-other-data")
    assert result.code == 2
    assert "--allow-other-data: goes with --resume" in result.err


def test_somebody_else_is_training_it(copy: Trained) -> None:
    import fcntl

    forget(copy.path, after=8)
    with (copy.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = resume(copy)
    assert result.code == 2
    assert "another process is training this run; wait" in result.err
    with RunDirectory(copy.path).lock():
        for what in ("newest", "auto", copy.path):
            result = resume(copy, what=str(what))
            assert result.code == 2
            assert f"another process is training this run (process {os.getpid()} on " in result.err
    assert resume(copy).code == 0


def test_a_failed_resume_keeps_the_checkpoints_of_a_run_without_a_ledger(
    copy: Trained, trained: Trained, tmp_path: Path
) -> None:
    forget(copy.path, after=8)
    (copy.path / "metrics.jsonl").unlink()
    (tmp_path / "other").mkdir()
    refused = resume(copy, "--set", f"data.path={write_shards(tmp_path / 'other', train=40)}")
    assert "the train data differ from those it was trained with" in refused.err
    result = resume(copy)
    assert result.code == 0, result.err
    assert losses(copy.path) == {step: loss for step, loss in losses(trained.path).items() if step >= 8}


# --------------------------------------------------------------------------------------------------------- init_from


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


# ----------------------------------------------------------------------------------------------------------- signals


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_result(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(
        tiny.read_text().replace("num_iterations = 12", "num_iterations = 120").replace("save_every = 4", "")
    )
    runs = tmp_path / "runs"
    arguments = [sys.executable, "-m", "nanochat_core", "run", str(tiny), "--runs-dir", str(runs)]
    process = subprocess.Popen(arguments, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ledgers = runs / "tiny"
    wait_for(
        lambda: any(f.stat().st_size > 3000 for f in ledgers.glob("*/metrics.jsonl")) or process.poll() is not None
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped by a signal after step" in out
    run = only_run(runs)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "preempted"
    stopped = status["step"]
    assert 0 < stopped < 120
    assert list(losses(run)) == list(range(stopped))
    assert (run / f"checkpoints/step_{stopped:06d}").is_dir()

    result = call("run", tiny, "--runs-dir", runs, "--resume")
    assert result.code == 0, result.err
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    whole = call("run", tiny, "--runs-dir", tmp_path / "whole")
    assert whole.code == 0
    assert losses(run) == losses(only_run(tmp_path / "whole"))
    assert metrics(run, "val/bpb") == metrics(only_run(tmp_path / "whole"), "val/bpb")


def test_training_that_diverges_stops_and_says_what_to_do(tiny: Path, tmp_path: Path) -> None:
    arguments = ("--set", "optimizer.plugin=adamw", "--set", "optimizer.lr=1e30", "--set", "train.grad_clip=0")
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *arguments, "--set", "train.max_skipped_steps=2")
    assert result.code == 3
    assert "3 steps in a row" in result.err
    assert "Lower the learning rates" in result.err
    run = only_run(tmp_path / "runs")
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    assert list(losses(run).values())[-1] in ("nan", "inf")


# ------------------------------------------------------------------------- plugins that break in the middle of a run

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
