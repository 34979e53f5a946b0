"""A run goes on with another number of ranks: the same rows in the same steps, the same but for the order of sums; with
the optimizers that nanochat ships."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch.distributed
from helpers.killing import write_killed
from helpers.ranks import call_on_ranks
from helpers.support import Result, call, losses, metrics, only_run
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("ranks"),
]

STEPS = 12
# In bfloat16 a product's rounding depends on how many matrices a rank multiplies at once.
OPTIMIZERS = {"muon_adamw": ("optimizer.ns_dtype=float32",), "adamw": ("optimizer.plugin=adamw",)}
KEEP = ("checkpoint.keep_last=100", "train.device_batch_size=2")


def run(file: Path, runs: Path, nproc: int, *settings: str, resume: bool = False) -> Result:
    words = [word for setting in settings for word in ("--set", setting)]
    arguments = ["run", file, "--runs-dir", runs, *(["--resume"] if resume else []), *words]
    if nproc == 1:
        result = call(*arguments)
    else:
        result = call_on_ranks(nproc, *arguments)
    assert result.code == 0, result.err
    return result


def interrupted(source: Path, runs: Path, after: int) -> Path:
    """A copy of a run as it was when it had just saved step ``after``."""
    shutil.copytree(source, runs / source.parent.name / source.name)
    path = only_run(runs)
    for checkpoint in (path / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > after:
            shutil.rmtree(checkpoint)
    return path


def assert_same_data(ours: Path, theirs: Path) -> None:
    """What the rows of each step were, and where the data stand at the end."""
    for name in ("train/cropped", "train/epoch"):
        assert metrics(ours, name) == pytest.approx(metrics(theirs, name), abs=1e-12)
    assert list(losses(ours)) == list(range(STEPS))
    ends = [json.loads((path / f"checkpoints/step_{STEPS:06d}/state.json").read_text()) for path in (ours, theirs)]
    for key in ("step", "tokens", "lanes", "cursors"):
        assert ends[0][key] == ends[1][key], key


def assert_close(ours: Path, theirs: Path) -> None:
    assert_same_data(ours, theirs)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    assert metrics(ours, "val/bpb") == pytest.approx(metrics(theirs, "val/bpb"), rel=1e-4)
    a, b = (load_file(path / f"checkpoints/step_{STEPS:06d}/model.safetensors") for path in (ours, theirs))
    assert a.keys() == b.keys()
    assert {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in a} == pytest.approx(
        dict.fromkeys(a, 0.0), abs=1e-3
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_killed(tmp_path_factory.mktemp("worlds"), STEPS, asynchronous=False)


AUTO = 'train.device_batch_size="auto"'


@pytest.fixture(scope="module")
def two(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, whose micro-batches are as large as can be."""
    runs = tmp_path_factory.mktemp("two")
    run(file, runs, 2, *OPTIMIZERS["muon_adamw"], "checkpoint.keep_last=100", AUTO)
    return only_run(runs)


@pytest.mark.parametrize("optimizer", ["muon_adamw", pytest.param("adamw", marks=pytest.mark.slow)])
def test_saved_on_two_ranks(file: Path, two: Path, tmp_path: Path, optimizer: str) -> None:
    """It goes on with one, and with four; and what four have saved, with one again."""
    settings, whole = (*OPTIMIZERS[optimizer], *KEEP), two
    if optimizer != "muon_adamw":
        run(file, tmp_path / "two", 2, *settings)
        whole = only_run(tmp_path / "two")
    one = interrupted(whole, tmp_path / "one", after=3)
    run(file, tmp_path / "one", 1, *settings, resume=True)
    assert_close(one, whole)
    four = interrupted(whole, tmp_path / "four", after=6)
    run(file, tmp_path / "four", 4, *settings, resume=True)
    assert_close(four, whole)
    again = interrupted(four, tmp_path / "again", after=9)
    run(file, tmp_path / "again", 1, *settings, resume=True)
    assert_close(again, whole)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_on_one_rank_it_goes_on_with_two(file: Path, tmp_path: Path, optimizer: str) -> None:
    settings = (*OPTIMIZERS[optimizer], *KEEP)
    run(file, tmp_path / "one", 1, *settings)
    whole = only_run(tmp_path / "one")
    two = interrupted(whole, tmp_path / "two", after=6)
    run(file, tmp_path / "two", 2, *settings, resume=True)
    assert_close(two, whole)


def test_the_batch_of_a_device_is_derived_anew_and_the_global_one_is_not(file: Path, two: Path, tmp_path: Path) -> None:
    settings = (*OPTIMIZERS["muon_adamw"], "checkpoint.keep_last=100", AUTO)

    def resolved(path: Path) -> tuple[int, int, str]:
        train = tomllib.loads((path / "experiment.toml").read_text())["train"]
        origin = json.loads((path / "provenance.json").read_text())["origins"]["train.device_batch_size"]
        return train["device_batch_size"], train["total_batch_size"], origin

    assert resolved(two)[:2] == (4, 256)
    assert "auto" in resolved(two)[2]
    same = interrupted(two, tmp_path / "same", after=9)
    run(file, tmp_path / "same", 2, *settings, resume=True)
    assert resolved(same)[:2] == (4, 256)
    assert losses(same) == losses(two)
    one = interrupted(two, tmp_path / "one", after=6)
    run(file, tmp_path / "one", 1, *settings, resume=True)
    assert resolved(one)[:2] == (8, 256)
    assert_close(one, two)
