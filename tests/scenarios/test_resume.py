"""A run that stops goes on to the same result; what may change meanwhile, and what not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.processes import Process
from helpers.support import Trained, call, ledger, losses, metrics, only_run, write_shards
from safetensors.torch import load_file

from nanochat_core.runs.checkpoint import load_state
from nanochat_core.runs.directory import RunDirectory


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
    assert "from step 8 on the val data differ from those" in allowed.out
    assert losses(copy.path) == losses(trained.path)
    # What was found on the old set, step 8 included, does not count in the list of runs, whatever comes later.
    records = [{**r, "val/bpb": 0.5} if "val/bpb" in r and r["time"] < started else r for r in ledger(copy.path)]
    (copy.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [r["step"] for r in records if r.get("val/bpb") == 0.5] == [0, 4, 8]
    assert resume(copy, "--set", f"data.path={elsewhere}").code == 0
    best = min(r["val/bpb"] for r in records if "val/bpb" in r and r["time"] > started)
    assert f" {best:.4f}  " in call("runs", "--runs-dir", copy.runs).out


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
    assert "--allow-other-data: is only allowed with --resume" in result.err


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


def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_result(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(
        tiny.read_text().replace("num_iterations = 12", "num_iterations = 120").replace("save_every = 4", "")
    )
    runs = tmp_path / "runs"
    with Process.run(tiny, "--runs-dir", runs) as process:
        process.wait_for(lambda: any(f.stat().st_size > 3000 for f in runs.glob("tiny/*/metrics.jsonl")))
        process.process.send_signal(signal.SIGTERM)
        code, out, err = process.end()
    assert code == 75, err
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
    settings = ("optimizer.plugin=adamw", "optimizer.lr=1e6", "optimizer.weight_decay=1e6", "train.grad_clip=0")
    arguments = [word for setting in settings for word in ("--set", setting)]
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *arguments, "--set", "train.max_skipped_steps=2")
    assert result.code == 3
    assert "3 steps in a row" in result.err
    assert "Lower the learning rates" in result.err
    run = only_run(tmp_path / "runs")
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    assert list(losses(run).values())[-1] in ("nan", "inf")
