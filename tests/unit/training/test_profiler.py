"""``[train] profile``: a trace that other programs can read, of steps that don't change by it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch.distributed
from helpers.ranks import call_on_ranks
from helpers.support import Trained, call, losses, only_run


def traced(run: Path, rank: int = 0) -> list[str]:
    """Names of the optimizer steps in a trace."""
    with gzip.open(run / "profile" / f"trace_rank{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"aten::mm", "aten::embedding"} & names
    return sorted(name for name in names if name.startswith("ProfilerStep#"))


def test_a_run_with_a_profile_is_the_same_run(tiny: Path, tmp_path: Path, trained: Trained) -> None:
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", "--set", "train.profile=2")
    assert result.code == 0, result.err
    run = only_run(tmp_path / "runs")
    assert traced(run) == ["ProfilerStep#10", "ProfilerStep#11"]
    summary = (run / "profile" / "summary.txt").read_text()
    assert "Operations by their own time on CPU" in summary
    assert "Self CPU" in summary
    (line,) = [line for line in result.out.splitlines() if line.startswith("profile of 2 steps")]
    assert str(run / "profile" / "trace_rank0.json.gz") in line
    assert losses(run) == losses(trained.path)
    assert result.err == ""


@pytest.mark.parametrize(("steps", "first", "last"), [(5, 7, 11), (100, 0, 11)])
def test_a_short_run_is_traced_at_its_end(tiny: Path, tmp_path: Path, steps: int, first: int, last: int) -> None:
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", "--set", f"train.profile={steps}")
    assert result.code == 0, result.err
    found = traced(only_run(tmp_path / "runs"))
    assert sorted(int(name.partition("#")[2]) for name in found) == list(range(first, last + 1))
    assert f"profile of {last + 1 - first} steps" in result.out


def test_a_run_that_ends_too_early_says_so(tiny: Path, tmp_path: Path) -> None:
    settings = ("train.profile=1", "optimizer.plugin=adamw", "optimizer.lr=1e6", "optimizer.weight_decay=1e6")
    settings = (*settings, "train.grad_clip=0", "train.max_skipped_steps=0")
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *(word for s in settings for word in ("--set", s)))
    assert result.code == 3
    (line,) = [line for line in result.out.splitlines() if line.startswith("no profile")]
    done = len(losses(only_run(tmp_path / "runs")))
    assert line == f"no profile was written: it starts after 10 steps, {done - 1} were run"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.xdist_group("ranks")
def test_every_rank_has_a_trace(tiny: Path, tmp_path: Path) -> None:
    settings = ("--set", "train.profile=1", "--set", "train.num_iterations=3")
    result = call_on_ranks(2, "run", tiny, "--runs-dir", tmp_path / "runs", *settings)
    assert result.code == 0, result.err
    assert result.out.count("profile of 1 step:") == 1
    run = only_run(tmp_path / "runs")
    assert traced(run, 0) == traced(run, 1) == ["ProfilerStep#2"]
    assert sorted(p.name for p in (run / "profile").iterdir()) == [
        "summary.txt", "trace_rank0.json.gz", "trace_rank1.json.gz",
    ]  # fmt: skip
