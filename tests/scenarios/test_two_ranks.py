"""Two processes over gloo: the same run as one, and failures that end both."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch.distributed
from helpers.processes import Process
from helpers.support import call, losses, metrics, only_run, spawn

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def compare(ours: Path, theirs: Path, steps: int) -> None:
    """The first ``steps`` steps of two runs are the same, but for the order of sums."""
    for name, tolerance in (("train/loss", 2e-4), ("train/grad_norm", 2e-3), ("val/bpb", 2e-4)):
        a, b = ({k: v for k, v in metrics(run, name).items() if k < steps} for run in (ours, theirs))
        assert a == pytest.approx(b, rel=tolerance)
        assert a


def test_two_ranks_train_like_one(on_two_ranks: tuple[Path, Path], tmp_path: Path) -> None:
    file, two = on_two_ranks
    alone = call("run", file, "--runs-dir", tmp_path / "one")
    assert alone.code == 0, alone.err
    compare(two, only_run(tmp_path / "one"), 13)
    assert list(losses(two)) == list(range(100))


def test_a_mistake_is_told_once(tiny: Path, tmp_path: Path) -> None:
    """Found by rank 0 while planning: 256 tokens are four rows of 32 on each of two ranks."""
    settings = ("--set", "train.device_batch_size=3")
    result = spawn("run", tiny, "--runs-dir", tmp_path / "runs", "--nproc", 2, *settings)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert "x 2 ranks" in line
    assert "device_batch_size 1, 2, 4 would work" in line
    assert not (tmp_path / "runs").exists()


def test_a_mistake_that_every_rank_meets_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = ("--set", f"data.path={tmp_path / 'empty'}")
    result = spawn("run", tiny, "--runs-dir", tmp_path / "runs", "--nproc", 2, *settings)
    assert result.code == 2
    assert f"--set data.path={tmp_path / 'empty'}: data.path: " in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "runs").exists()


def test_told_to_stop_all_ranks_stop_together_and_one_goes_on(tiny: Path, tmp_path: Path) -> None:
    text = tiny.read_text().replace("num_iterations = 12", "num_iterations = 100000").replace("save_every = 4", "")
    # In bfloat16 a product's rounding depends on how many matrices a rank multiplies at once.
    tiny.write_text(text.replace('plugin = "muon_adamw"', 'plugin = "muon_adamw"\nns_dtype = "float32"'))
    runs = tmp_path / "runs"
    with Process.run(tiny, "--runs-dir", runs, "--nproc", 2) as process:
        process.wait_for(lambda: any(f.stat().st_size > 3000 for f in runs.glob("*/*/metrics.jsonl")))
        process.process.send_signal(signal.SIGTERM)
        code, out, err = process.end()
    assert code == 75, err
    assert "stopped by a signal" in out
    run = only_run(runs)
    status = json.loads((run / "status.json").read_text())
    stopped = status["step"]
    assert status["status"] == "preempted"
    assert (run / f"checkpoints/step_{stopped:06d}").is_dir()
    assert list(losses(run)) == list(range(stopped))

    settings = ("--set", f"train.num_iterations={stopped + 5}", "--set", "schedule.warmdown_ratio=0")
    alone = call("run", tiny, "--runs-dir", tmp_path / "alone", *settings)
    assert alone.code == 0, alone.err
    further = call("run", tiny, "--runs-dir", runs, "--resume", *settings)
    assert further.code == 0, further.err
    assert "it was trained on 2 x CPU" in further.out
    assert "continues on 1 x CPU" in further.out
    assert list(losses(run)) == list(range(stopped + 5))
    compare(run, only_run(tmp_path / "alone"), 20)  # later steps drift apart
    assert losses(run)[stopped + 4] == pytest.approx(losses(only_run(tmp_path / "alone"))[stopped + 4], rel=0.05)
