"""What breaks around a run: damaged files, signals at bad moments, clocks and disks. It goes on to the same result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.processes import Process
from helpers.support import Site, Trained, assert_same_end, call, ledger, losses, metrics, only_run
from safetensors.torch import load_file

from nanochat_core.runs.checkpoint import verify

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Trained:
    """The finished run as it was when it had just saved step 8, to be changed."""
    shutil.copytree(trained.runs, tmp_path / "runs")
    path = only_run(tmp_path / "runs")
    shutil.rmtree(path / "checkpoints/step_000012")
    return Trained(trained.file, tmp_path / "runs", path, trained.result)


def resume(run: Trained, *more: object):  # type: ignore[no-untyped-def]
    return call("run", run.file, "--runs-dir", run.runs, "--resume", *more)


# ----------------------------------------------------------------------------------------------------- damaged files


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(where: float) -> Callable[[Path], None]:
    def flip_one(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return flip_one


@pytest.mark.parametrize("damage", [truncate, empty, flip(0), flip(0.5), flip(0.98)], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_of_a_checkpoint_leads_to_the_same_end(
    copy: Trained, trained: Trained, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copy.path / "checkpoints/step_000008" / name)
    result = resume(copy)
    assert result.code == 0, result.err
    assert f"step_000008: {name}" in result.err
    assert "from step_000004" in result.out
    assert_same_end(copy.path, trained.path)
    assert verify(copy.path / "checkpoints/step_000008") == ""  # written anew


def test_no_bit_of_a_manifest_can_change_unseen(copy: Trained) -> None:
    checkpoint = copy.path / "checkpoints/step_000008"
    file = checkpoint / "manifest.json"
    data = file.read_bytes()
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << index % 7
        file.write_bytes(changed)
        assert verify(checkpoint) or json.loads(changed) == json.loads(data), index
    file.write_bytes(data)
    assert verify(checkpoint) == ""


def test_every_checkpoint_damaged_is_said_and_auto_starts_afresh(copy: Trained, trained: Trained) -> None:
    for step in ("000004", "000008"):
        truncate(copy.path / f"checkpoints/step_{step}/model.safetensors")
    refused = resume(copy)
    assert refused.code == 2
    assert refused.err.count("model.safetensors has") == 2
    assert "has no sound checkpoint" in refused.err
    fresh = call("run", copy.file, "--runs-dir", copy.runs, "--resume", "auto")
    assert fresh.code == 0
    assert len(list(copy.runs.glob("tiny/*"))) == 2


# ----------------------------------------------------------------------------------------------------------- signals

WAITS = """
import os, threading, time
from pathlib import Path
from nanochat_core import DataSource, Evaluation, Evaluator

@attrs.frozen
class File:
    file: str
    signal: int = 0  # that it sends to its own process

class Sleeps(Evaluator):
    '''The first time, on one rank, until it is interrupted. The other rank waits for what it has to say.'''
    def __init__(self, config, context):
        self.file, self.signal, self.world = Path(config.file), config.signal, context.world
    def evaluate(self, model, step):
        if self.world.rank == self.world.size - 1 and not self.file.exists():
            self.file.touch()
            if self.signal: threading.Timer(0.1, os.kill, (os.getpid(), self.signal)).start()
            try:
                time.sleep(600)
            except Exception: pass
        return Evaluation({"val/sum": self.world.sum([1.0])[0]})

class Stalls(DataSource):
    '''Whoever asks for a document waits while the file is there.'''
    def __init__(self, config, context): self.file = Path(config.file)
    def documents(self, split):
        return Documents(self.file) if split == "train" else ["some words to be evaluated"] * 20

class Documents(list):
    def __init__(self, file):
        super().__init__(f"document {i}, which has {i * i} words" for i in range(50))
        self.file = file
    def __getitem__(self, index):
        while self.file.exists(): time.sleep(0.01)
        return super().__getitem__(index)

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("sleeps", config=File, factory="made_up.plugin:Sleeps")

@hookimpl
def nanochat_register_data_sources(registry):
    registry.add("stalls", config=File, factory="made_up.plugin:Stalls")
"""


@pytest.mark.parametrize(
    ("at", "nproc", "number"),
    [
        (0, 0, signal.SIGUSR1),
        (4, 1, signal.SIGTERM),
        (6, 0, signal.SIGINT),
        (12, 0, signal.SIGTERM),
        (6, 0, signal.SIGHUP),
        (6, 0, signal.SIGXCPU),
        (4, 2, signal.SIGTERM),
    ],
)
def test_a_signal_cuts_an_evaluation_short(
    site: Site, tiny: Path, tmp_path: Path, trained: Trained, at: int, nproc: int, number: int
) -> None:
    """At the start, at a step that is saved, at one that is not, at the end; and with another rank that waits.

    ``nproc`` 0 is this process, which gets the signal from itself.
    """
    site.add("made-up", WAITS)
    started = tmp_path / "started"
    keys = {0: "at_start=true", 12: "at_end=true"}.get(at, f"every={at}")
    settings = ("evaluators.z.plugin=sleeps", f"evaluators.z.file={started}", "evaluators.z.at_end=false")
    words = [word for s in (*settings, f"evaluators.z.{keys}") for word in ("--set", s)]
    runs = tmp_path / "runs"
    if nproc:
        with Process.run(tiny, "--runs-dir", runs, "--nproc", nproc, *words, site=site.directory) as process:
            process.wait_for(started.exists)
            process.process.send_signal(number)
            code, out, err = process.end()
    else:
        stopped = call("run", tiny, "--runs-dir", runs, *words, "--set", f"evaluators.z.signal={int(number)}")
        code, out, err = stopped.code, stopped.out, stopped.err
    assert code == 75, err
    assert f"stopped by a signal after step {at}, saved" in out
    path = only_run(runs)
    assert json.loads((path / "status.json").read_text())["status"] == "preempted"
    assert verify(path / f"checkpoints/step_{at:06d}") == ""
    assert metrics(path, "z/val/sum") == {}
    assert at % 4 or at in metrics(path, "val/bpb")  # what was found before is kept
    if nproc > 1:
        return  # goes on with one rank, to the same but for the order of sums: see test_two_ranks.py
    result = call("run", tiny, "--runs-dir", runs, "--resume", *words)
    assert result.code == 0, result.err
    assert at in metrics(path, "z/val/sum")
    assert_same_end(path, trained.path)


def test_a_signal_ends_the_wait_for_data(site: Site, tiny: Path, tmp_path: Path) -> None:
    site.add("made-up", WAITS)
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    data = f'plugin = "stalls"\nfile = "{gate.as_posix()}"'
    text = tiny.read_text().replace("save_every = 4", "").replace("num_iterations = 12", "num_iterations = 60")
    head, _, tail = text.partition('plugin = "parquet"')
    tiny.write_text(head + data + tail[tail.index("\n\n") :])
    with Process.run(tiny, "--runs-dir", runs, "--set", "train.stall_warning=0.5", site=site.directory) as process:
        process.wait_for(lambda: bool(list(runs.glob("*/*/metrics.jsonl"))) and len(ledger(only_run(runs))) > 5)
        gate.touch()
        path = only_run(runs)
        process.wait_for(lambda: "waits for training data" in (path / "log.txt").read_text())
        process.process.send_signal(signal.SIGTERM)
        code, out, err = process.end()  # although what reads can't be interrupted
    gate.unlink()
    assert code == 75, err
    assert "stopped by a signal after step" in out
    result = call("run", tiny, "--runs-dir", runs, "--resume")
    assert result.code == 0, result.err
    whole = call("run", tiny, "--runs-dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert losses(path) == losses(only_run(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------- ledgers, disks, clocks


@pytest.mark.parametrize("after", [8, 11])
def test_a_ledger_cut_in_the_middle_of_a_line(copy: Trained, trained: Trained, after: int) -> None:
    """Within what the checkpoint of step 8 has seen, as after a power cut, and after it."""
    file = copy.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == after - 1)
    file.write_bytes(b"".join(lines[:first]) + lines[first][: len(lines[first]) // 2])
    result = resume(copy)
    assert result.code == 0, result.err
    expected = {step: loss for step, loss in losses(trained.path).items() if after > 8 or step != 7}
    assert losses(copy.path) == expected  # a line that the disk lost is lost, and none is torn or there twice
    copied, whole = (load_file(p / "checkpoints/step_000012/model.safetensors") for p in (copy.path, trained.path))
    assert all(torch.equal(copied[name], whole[name]) for name in whole)


def test_a_runs_directory_that_is_read_only(copy: Trained, tmp_path: Path) -> None:
    runs = copy.runs
    options = [["--bind"], ["-o", "remount,ro,bind"]]
    if shutil.which("mount") is None or any(
        subprocess.run(["mount", *words, runs, runs], capture_output=True, check=False).returncode for words in options
    ):
        pytest.skip("needs the right to mount")
    try:
        fresh = call("run", copy.file, "--runs-dir", runs)
        again = resume(copy)
        looked = call("runs", "--runs-dir", runs)
    finally:
        subprocess.run(["umount", runs], check=True)
    assert fresh.code == 2
    assert "can't write run directories" in fresh.err
    assert "--runs-dir" in fresh.err
    assert again.code == 2
    assert f"{copy.path} can't be written (Read-only file system)" in again.err
    assert looked.code == 0
    assert copy.path.name in looked.out
    assert resume(copy).code == 0


def test_a_clock_that_goes_backwards(
    tiny: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()

    def backwards() -> float:
        nonlocal now
        now -= 60
        return now

    monkeypatch.setattr(time, "time", backwards)
    assert call("run", tiny, "--runs-dir", tmp_path / "runs", "--set", "train.num_iterations=12").code == 0
    path = only_run(tmp_path / "runs")
    assert_same_end(path, trained.path)
    shutil.rmtree(path / "checkpoints/step_000012")
    assert call("run", tiny, "--runs-dir", tmp_path / "runs", "--resume").code == 0
    assert_same_end(path, trained.path)
    assert call("runs", "--runs-dir", tmp_path / "runs").code == 0
