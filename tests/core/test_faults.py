"""What breaks around a run: damaged files, signals at bad moments, clocks and disks. It goes on to the same result."""

from __future__ import annotations

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
from safetensors.torch import load_file
from support import Site, Trained, call, ledger, losses, metrics, only_run

from nanochat_core.checkpoint import verify

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Trained:
    """The finished run as it was when it had just saved step 8, to be changed."""
    shutil.copytree(trained.runs, tmp_path / "runs")
    path = only_run(tmp_path / "runs")
    shutil.rmtree(path / "checkpoints/step_000012")
    return Trained(trained.file, tmp_path / "runs", path, trained.result)


def same_run(ours: Path, theirs: Path) -> None:
    """Two runs ended with the same parameters, optimizer state and random generators, bit for bit, and say so."""
    for name in ("model", "optimizer", "rng"):
        a, b = (load_file(path / "checkpoints/step_000012" / f"{name}.safetensors") for path in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert losses(ours) == losses(theirs)
    assert metrics(ours, "val/bpb") == metrics(theirs, "val/bpb")


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
    same_run(copy.path, trained.path)
    assert verify(copy.path / "checkpoints/step_000008") == ""  # written anew


def test_no_bit_of_a_manifest_can_change_unseen(copy: Trained) -> None:
    checkpoint = copy.path / "checkpoints/step_000008"
    file = checkpoint / "manifest.json"
    data = file.read_bytes()
    for index in range(len(data)):
        for bit in (0, 4):
            changed = bytearray(data)
            changed[index] ^= 1 << bit
            file.write_bytes(changed)
            assert verify(checkpoint) or json.loads(changed) == json.loads(data), (index, bit)
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
