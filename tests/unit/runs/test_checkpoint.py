"""Checkpoints: there and back exactly, verified, atomic; what is damaged is named and passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from nanochat_core import CheckpointError
from nanochat_core.runs.checkpoint import (
    CheckpointContent,
    latest_checkpoint,
    load_checkpoint,
    load_model_tensors,
    load_weights,
    model_tensors,
    save_checkpoint,
    verify,
)
from nanochat_core.runs.state import TrainState
from nanochat_core.runs.upgrades import ModelRecord


def content(step: int) -> CheckpointContent:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, generator=generator)
    return CheckpointContent(
        model={"weight": weight, "half": weight.bfloat16(), "transposed": weight.T},
        optimizer={"weight/moment": weight * 2, "weight/step": torch.tensor(float(step))},
        rng={"0/cpu": generator.get_state()},
        state=TrainState(
            step=step, tokens=5 * step, lanes=2, cursors={0: (0, 3, 7), 1: (1, 0, 2)}, loss_ema=0.1 + step / 3,
            minimum={"val/bpb": 1 / 3}, ledger_bytes=99,
        ),
        built_from=ModelRecord("gpt", 3, {"depth": 2, "window": None, "pattern": ["S", "L"], "rate": 0.1}),
    )  # fmt: skip


def test_there_and_back(tmp_path: Path) -> None:
    saved = content(7)
    path = save_checkpoint(tmp_path / "checkpoints", saved)
    assert path.name == "step_000007"
    assert verify(path) == ""
    again = load_checkpoint(path)
    assert again.state == saved.state
    assert again.built_from == saved.built_from
    for part in ("model", "optimizer", "rng"):
        before, after = getattr(saved, part), getattr(again, part)
        assert before.keys() == after.keys()
        for name in before:
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name])
    assert torch.equal(load_weights(path)["weight"], saved.model["weight"])


def test_nothing_is_pickled_and_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, content(7))
    names = {p.name for p in path.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert manifest["step"] == 7


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, content(7))
    save_checkpoint(tmp_path, content(7))  # again, over the old one
    save_checkpoint(tmp_path, content(12))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000007", "step_000012"]
    assert verify(tmp_path / "step_000007") == ""


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
def test_one_flipped_byte_is_found_and_the_one_before_is_taken(tmp_path: Path, name: str) -> None:
    sound, damaged = save_checkpoint(tmp_path, content(5)), save_checkpoint(tmp_path, content(10))
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    found, problems = latest_checkpoint(tmp_path)
    assert found == sound
    (line,) = problems
    assert str(damaged) in line
    assert name in line
    assert "skipped" in line


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is unreadable"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is unreadable"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 bytes"),
        (lambda p: (p / "manifest.json").write_text('{"version": 99, "files": {}}'), "newer nanochat"),
        (lambda p: (p / "manifest.json").write_text('{"version": 3, "files": {}}'), "files lacks model.safetensors"),
    ],
)
def test_other_damage(tmp_path: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    path = save_checkpoint(tmp_path, content(5))
    damage(path)
    found, problems = latest_checkpoint(tmp_path)
    assert found is None
    assert words in problems[0]


def test_newest_is_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        save_checkpoint(tmp_path, content(step))
    (tmp_path / "step_notes").mkdir()
    (tmp_path / ".step_2000000.77").mkdir()  # of a process that was killed while it saved
    assert latest_checkpoint(tmp_path) == (tmp_path / "step_1000000", [])
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])


def test_a_save_that_fails_says_so_and_keeps_the_old_ones(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    save_checkpoint(directory, content(5))
    saved = sorted(directory.rglob("*"))
    shutil.move(directory, tmp_path / "aside")
    directory.write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="step_000006 could not be saved"):
        save_checkpoint(directory, content(6))
    directory.unlink()
    shutil.move(tmp_path / "aside", directory)
    assert sorted(directory.rglob("*")) == saved


class Tied(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("recomputed", torch.ones(2), persistent=False)


def test_tied_weights_are_saved_once_and_come_back_tied() -> None:
    tensors = model_tensors(Tied())
    assert set(tensors) == {"embedding.weight", "kept"}
    other = Tied()
    load_model_tensors(other, tensors, "somewhere")
    assert torch.equal(other.head.weight, tensors["embedding.weight"])
    assert other.head.weight is other.embedding.weight


def test_tensors_that_do_not_fit_are_named() -> None:
    tensors = model_tensors(Tied())
    with pytest.raises(
        CheckpointError, match=r"x/step_1 does not fit .*embedding\.weight is \[5, 3\], the model's \[5, 4\]"
    ):
        load_model_tensors(Tied(4), tensors, "x/step_1")
    with pytest.raises(CheckpointError, match=r"bias is not in the model; kept is missing"):
        load_model_tensors(Tied(), {"embedding.weight": tensors["embedding.weight"], "bias": torch.ones(1)}, "x")
