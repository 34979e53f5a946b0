"""Saving and deleting checkpoints, saving in the background, and disks that are full."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.support import Site, Trained, assert_same_end, call, losses, metrics, only_run

from nanochat_core.config.schema import Checkpoint
from nanochat_core.runs.checkpoint import (
    CheckpointContent,
    remove_leftovers,
    save_checkpoint,
    verify,
)
from nanochat_core.runs.saver import Saver
from nanochat_core.runs.state import TrainState
from nanochat_core.runs.upgrades import ModelRecord


def content(step: int, size: int = 12) -> CheckpointContent:
    return CheckpointContent(
        model={"weight": torch.arange(float(size))},
        optimizer={"weight/moment": torch.ones(3)},
        rng={"0/cpu": torch.Generator().get_state()},
        state=TrainState(step=step, lanes=1, cursors={0: (0, 0, 0)}),
        built_from=ModelRecord("gpt", 1, {}),
    )


def saver(directory: Path, **options: object) -> tuple[Saver, list[str]]:
    said: list[str] = []
    return Saver(directory, Checkpoint(**options), said.append), said  # type: ignore[arg-type]


def steps(directory: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in directory.glob("step_*"))


def test_checkpoints_later_than_the_run_are_left_alone_and_do_not_count(tmp_path: Path) -> None:
    """Resumed from 10, because 20 is damaged: at 15 the newest of the run is 15, and 20 is not what to go on from."""
    ours, _ = saver(tmp_path, keep_last=1)
    for step in (5, 10, 20, 15):
        ours.save(content(step))
    ours.retain(15)
    assert steps(tmp_path) == [15, 20]


def test_the_sound_one_stays_when_saves_fail(tmp_path: Path) -> None:
    """Resumed from 5, because 8 is damaged; the save of 10 fails."""
    for step in (5, 8):
        save_checkpoint(tmp_path, content(step))
    ours, _ = saver(tmp_path, keep_last=1)
    ours.sound = 5
    ours.retain(10)
    assert 5 in steps(tmp_path)


def test_no_score_is_said_once_and_deletes_nothing(tmp_path: Path) -> None:
    ours, said = saver(tmp_path, keep_best=1, best_metric="val/bbp")
    for step in (1, 2, 3):
        ours.save(content(step))
        ours.note(step, {"val/bpb": 1.0, "text": "x"})
        ours.retain(step)
    assert steps(tmp_path) == [1, 2, 3]
    (line,) = [line for line in said if "keep_best" in line]
    assert "'val/bbp'" in line


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, content(5))
    shutil.copytree(path, tmp_path / ".step_000010.123")
    (tmp_path / ".step_000004.deleted.77").mkdir()
    (tmp_path / "notes").mkdir()
    assert remove_leftovers(tmp_path) == [".step_000004.deleted.77", ".step_000010.123"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_000005"]
    assert remove_leftovers(tmp_path / "nowhere") == []


# ---------------------------------------------------------------------------------------------------------- in a run


def run(file: Path, runs: Path, *settings: str, more: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    return call("run", file, "--runs-dir", runs, *more, *(word for s in settings for word in ("--set", s)))


KEEP = ("checkpoint.save_every=2", "checkpoint.keep_last=1", "checkpoint.keep_every=6", "evaluators.bpb.every=2")


def test_a_run_keeps_what_it_is_told(tiny: Path, tmp_path: Path) -> None:
    best = "checkpoint.keep_best=1", "checkpoint.best_is=largest"  # bpb falls: the oldest that is saved
    result = run(tiny, tmp_path / "runs", *KEEP, *best)
    assert result.code == 0, result.err
    path = only_run(tmp_path / "runs")
    assert steps(path / "checkpoints") == [2, 6, 12]
    assert len(list((path / "checkpoints").iterdir())) == 3
    assert all(verify(p) == "" for p in (path / "checkpoints").iterdir())


def test_what_was_best_is_remembered_over_a_resume(tiny: Path, tmp_path: Path) -> None:
    best = "checkpoint.keep_best=1", "checkpoint.best_is=largest"
    assert run(tiny, tmp_path / "runs", *KEEP, *best, "train.num_iterations=4").code == 0
    path = only_run(tmp_path / "runs")
    assert steps(path / "checkpoints") == [2, 4]
    (path / "checkpoints/.step_000006.99").mkdir()
    result = run(tiny, tmp_path / "runs", *KEEP, *best, more=("--resume",))
    assert result.code == 0, result.err
    assert steps(path / "checkpoints") == [2, 6, 12]
    assert not list((path / "checkpoints").glob(".*"))
    assert "removed .step_000006.99" in (path / "log.txt").read_text()


def test_scores_on_other_validation_data_do_not_count(tiny: Path, tmp_path: Path, shards: Path) -> None:
    best = "checkpoint.keep_best=1", "checkpoint.best_is=largest", "checkpoint.save_every=2", "evaluators.bpb.every=2"
    assert run(tiny, tmp_path / "runs", *best, "train.num_iterations=4").code == 0
    path = only_run(tmp_path / "runs")
    shutil.copytree(shards, tmp_path / "other")
    # what was the training shard in front moves behind: another validation set, and other training data
    (tmp_path / "other/shard_00000.parquet").rename(tmp_path / "other/shard_00002.parquet")
    other = (*best, f"data.path={tmp_path / 'other'}")
    result = run(tiny, tmp_path / "runs", *other, more=("--resume", "--allow-other-data"))
    assert result.code == 0, result.err
    assert 2 not in steps(path / "checkpoints")
    assert 12 in steps(path / "checkpoints")


def test_a_resume_from_a_checkpoint_written_in_the_background_is_exact(
    tiny: Path, tmp_path: Path, trained: Trained
) -> None:
    result = run(tiny, tmp_path / "runs", "checkpoint.asynchronous=true", "checkpoint.save_every=1")
    assert result.code == 0, result.err
    path = only_run(tmp_path / "runs")
    assert_same_end(path, trained.path)
    assert result.out.count("saved ") == 12
    for step in range(6, 13):
        shutil.rmtree(path / f"checkpoints/step_{step:06d}")
    result = run(tiny, tmp_path / "runs", "checkpoint.asynchronous=true", more=("--resume",))
    assert result.code == 0, result.err
    assert "from step_000005" in result.out
    assert_same_end(path, trained.path)


def test_retention_waits_for_saves_in_the_background(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "runs", *KEEP, "checkpoint.asynchronous=true")
    assert result.code == 0, result.err
    assert steps(only_run(tmp_path / "runs") / "checkpoints") == [6, 12]


# -------------------------------------------------------------------------------------------------------- full disks


def test_a_checkpoint_that_does_not_fit_says_how_much_is_missing(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    big = content(5)
    # 16 TiB that take no memory
    model = {f"{i}": torch.zeros(1).expand(2**30, 2**12) for i in range(max(1, free // 2**44 + 1))}
    ours, said = saver(tmp_path / "checkpoints")
    ours.save(CheckpointContent(model, big.optimizer, big.rng, big.state, big.built_from))
    (line,) = said
    assert "step_000005 could not be saved: it needs" in line
    assert "bytes are missing" in line
    assert "the last good checkpoint stays" in line
    assert list((tmp_path / "checkpoints").iterdir()) == []
    ours.save(content(6))
    assert steps(tmp_path / "checkpoints") == [6]


LIMITED = """
import resource, sys
import nanochat_core.training.checkpoints
from nanochat_core.cli import main
nanochat_core.training.checkpoints.PAUSES = (0.0,)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_a_write_that_fails_half_way_leaves_nothing(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    """No file may be larger than 20 KB: the model's can't be written whole, as when a disk fills up meanwhile."""
    arguments = [sys.executable, "-c", LIMITED, "20000", "run", str(tiny), "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 6, done.stderr
    path = only_run(tmp_path / "runs")
    assert done.stdout.count("could not be saved") == 4  # tried again each time, the last once more
    assert json.loads((path / "status.json").read_text())["status"] == "failed"
    assert list((path / "checkpoints").iterdir()) == []
    assert losses(path) == losses(trained.path)


BALLAST = """
from pathlib import Path
from nanochat_core import Evaluation, Evaluator

@attrs.frozen
class Fill:
    file: str
    at: tuple[int, ...]

class Ballast(Evaluator):
    def __init__(self, config, context): self.file, self.at = Path(config.file), config.at
    def evaluate(self, model, step):
        if step in self.at:
            try:
                with self.file.open("ab", buffering=0) as file:
                    while True: file.write(bytes(4096))
            except OSError: pass
        else:
            self.file.unlink(missing_ok=True)
        return Evaluation({f"val/{i}": 1 / 3 for i in range(300)})  # more than fits in what is left of a page

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("ballast", config=Fill, factory="made_up.plugin:Ballast")
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_fails_the_save_and_not_the_run(
    tiny: Path, tmp_path: Path, small_disk: Path, trained: Trained, site: Site, asynchronous: str
) -> None:
    """Another program fills the disk after step 2, and gives it back after step 8; saved at 4, 8, 12."""
    site.add("made-up", BALLAST)
    ballast = (
        "evaluators.ballast.plugin=ballast", f"evaluators.ballast.file={small_disk / 'ballast'}",
        "evaluators.ballast.at=[2, 4, 6]", "evaluators.ballast.every=2", "checkpoint.keep_last=1",
    )  # fmt: skip
    result = run(tiny, small_disk / "runs", *ballast, f"checkpoint.asynchronous={asynchronous}")
    assert result.code == 0, result.err
    path = only_run(small_disk / "runs")
    assert "step_000004 could not be saved: it needs" in result.out
    assert "bytes are missing" in result.out
    assert "the ledger can't be written" in result.out
    assert "the ledger can be written again" in result.out
    assert steps(path / "checkpoints") == [12]
    assert not list(path.rglob(".*"))
    assert list(metrics(path, "val/0")) == [2, 4, 6, 8, 10, 12]
    assert losses(path) == losses(trained.path)
