"""Checkpoints whose checksums are right and whose content is not: each is named and passed over, by every reader."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.fuzzing import time_limit
from helpers.sealing import edit_json, edit_tensors, seal
from helpers.support import Trained, call, only_run

Change = Callable[[Path], object]


def state(**changes: object) -> Change:
    return lambda checkpoint: edit_json(checkpoint / "state.json", **changes)


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda checkpoint: edit_tensors(checkpoint / f"{part}.safetensors", change)


def convert(dtype: torch.dtype) -> Change:
    return tensors("model", lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))


def option(**changes: object) -> Change:
    return lambda checkpoint: seal(checkpoint, lambda m: m["model"]["options"].update(changes))


def manifest(**changes: object) -> Change:
    return lambda checkpoint: seal(checkpoint, lambda m: m.update(changes))


def link(name: str, target: str) -> Change:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to(target)
        seal(checkpoint, lambda m: m["files"][name].update(bytes=0))

    return change


def fifo(name: str) -> Change:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)

    return change


def header(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


CHANGES: dict[str, tuple[Change, str]] = {
    "state is no object": (lambda c: (c / "state.json").write_text("[1]"), "state.json is unreadable"),
    "state nested deeply": (lambda c: (c / "state.json").write_text("[" * 100_000), "state.json is unreadable"),
    "state lacks": (lambda c: (c / "state.json").write_text('{"step": 12}'), "state.json is unreadable"),
    "state has more": (state(more=1), "state.json is unreadable"),
    "step is a text": (state(step="12"), "step must not be '12'"),
    "step is another": (state(step=11), "state.json is of step 11, manifest.json of step 12"),
    "step is huge": (state(step=10**400), "step must not be"),
    "loss is a text": (state(loss_ema="x"), "loss_ema must not be 'x'"),
    "loss is infinite": (state(loss_ema=float("inf")), "loss_ema must not be inf"),
    "cursors are a list": (state(cursors=[1]), "cursors must not be"),
    "a lane is no number": (state(cursors={"²": [0, 0, 0]}), "cursors must not be"),
    "a cursor is short": (state(cursors={"0": [0, 0]}), "cursors must not be"),
    "lanes do not fit": (state(lanes=1), "cursors of more than 1 lanes"),
    "minimum is a list": (state(minimum=[]), "minimum must not be"),
    "fingerprints are numbers": (state(fingerprints={"train": 1}), "fingerprints must not be"),
    "bytes are negative": (state(ledger_bytes=-1), "ledger_bytes must not be -1"),
    "header is rubbish": (header, "model.safetensors is damaged"),
    "model is empty": (lambda c: (c / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "weights are bool": (convert(torch.bool), "is of type BOOL, the model's F32"),
    "weights are int64": (convert(torch.int64), "is of type I64, the model's F32"),
    "weights are float16": (convert(torch.float16), "is of type F16, the model's F32"),
    "a weight is missing": (tensors("model", lambda t: t.pop("head.weight")), "belongs to no parameter"),
    "a weight too many": (tensors("model", lambda t: t.update(extra=torch.ones(1))), "extra is not in the model"),
    "optimizer of others": (tensors("optimizer", lambda t: t.update({"x/y": torch.ones(1)})), "has 'x/y', which"),
    "generators are floats": (tensors("rng", lambda t: t.update({"0/cpu": torch.ones(5)})), "no state of a generator"),
    "generators are short": (tensors("rng", lambda t: t.update({"0/cpu": t["0/cpu"][:9]})), "no state of a generator"),
    "options are huge": (option(depth=40, n_head=64, n_kv_head=64), "do not fit the options in manifest.json"),
    "an option is a text": (option(depth="x"), "manifest.json has wrong options of the model"),
    "an option is unknown": (option(nobody=1), "manifest.json has wrong options of the model"),
    "no files": (manifest(files={}), "files lacks model.safetensors"),
    "files are a list": (manifest(files=[]), "files must be an object"),
    "no model": (manifest(model=None), "model must be an object"),
    "model is a list": (manifest(model=[]), "model must be an object"),
    "model of a number": (manifest(model={"plugin": 1, "version": 1, "options": {}}), "model.plugin must be"),
    "plugins are a list": (manifest(plugins=[]), "plugins must be an object"),
    "version is a text": (manifest(version="3"), "version must be a whole number"),
    "a name that leads elsewhere": (
        lambda c: seal(c, lambda m: m["files"].update({"/dev/zero": {"bytes": 0, "sha256": ""}})),
        "the name of a file must not",
    ),
    "a link to zeros": (link("optimizer.safetensors", "/dev/zero"), "optimizer.safetensors is unreadable"),
    "a link to nothing": (link("rng.safetensors", "nowhere"), "rng.safetensors is missing"),
    "a pipe": (fifo("model.safetensors"), "model.safetensors is unreadable"),
    "a pipe for a manifest": (fifo("manifest.json"), "manifest.json is unreadable"),
}
NOT_SEALED = ("an option", "options", "no files", "files", "no model", "model is a", "model of", "plugins", "version",
              "a name", "a link", "a pipe")  # fmt: skip


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Trained:
    shutil.copytree(trained.runs, tmp_path / "runs")
    return Trained(trained.file, tmp_path / "runs", only_run(tmp_path / "runs"), trained.result)


@pytest.mark.parametrize("what", CHANGES)
def test_wrong_content_is_passed_over(copy: Trained, what: str) -> None:
    change, words = CHANGES[what]
    newest = copy.path / "checkpoints/step_000012"
    change(newest)
    if not what.startswith(NOT_SEALED):
        seal(newest)
    with time_limit():
        result = call("sample", "tiny", "one, ", "--runs-dir", copy.runs, "--max-tokens", 2)
    assert result.code == 0, result.err
    (line,) = [line for line in result.err.splitlines() if "it is skipped" in line]
    assert line.startswith(f"{newest}: ")
    assert words in line
    assert "step_000008" in result.err
    assert len(line) < 1000


@pytest.mark.parametrize("what", ["weights are bool", "state lacks", "options are huge"])
def test_every_reader_passes_it_over(copy: Trained, tmp_path: Path, what: str) -> None:
    newest = copy.path / "checkpoints/step_000012"
    CHANGES[what][0](newest)
    if not what.startswith(NOT_SEALED):
        seal(newest)
    refused = call("eval", newest, "--evaluator", "bpb")
    assert refused.code == 2
    assert CHANGES[what][1] in refused.err
    for command in (
        ["eval", "tiny", "--runs-dir", copy.runs, "--evaluator", "bpb"],
        ["run", copy.file, "--runs-dir", tmp_path / "other", "--set", f"train.init_from={copy.path}"],
        ["run", copy.file, "--runs-dir", copy.runs, "--resume"],
    ):
        result = call(*command)
        assert result.code == 0, result.err
        assert f"{newest}: " in result.err
        assert "it is skipped" in result.err


@pytest.mark.parametrize(
    "name", ["step_²²²²²²", "step_foo", "step_-00012", "step_0000012x", "step_000099", "step_999999"]
)
def test_stray_names_among_checkpoints_stop_nothing(copy: Trained, name: str) -> None:
    """Empty directories, and one of a name that is right: it has no manifest."""
    (copy.path / "checkpoints" / name).mkdir()
    (copy.path / "checkpoints" / f"{name}.txt").touch()
    sampled = call("sample", "tiny", "one, ", "--runs-dir", copy.runs, "--max-tokens", 2)
    assert sampled.code == 0, sampled.err
    settings = ("train.num_iterations=14", "checkpoint.keep_last=1")
    words = [word for setting in settings for word in ("--set", setting)]
    result = call("run", copy.file, "--runs-dir", copy.runs, "--resume", *words)
    assert result.code == 0, result.err
    assert (copy.path / "checkpoints" / f"{name}.txt").exists()


def test_a_checkpoint_of_another_name_is_not_taken_for_that_step(copy: Trained) -> None:
    (copy.path / "checkpoints/step_000008").rename(copy.path / "checkpoints/step_000020")
    result = call("sample", "tiny", "one, ", "--runs-dir", copy.runs, "--max-tokens", 2)
    assert result.code == 0, result.err
    assert "step_000020: holds step 8, not that of its name; it is skipped" in result.err
    assert "(from" in result.err
    assert "step_000012" in result.err


def test_files_of_checkpoints_have_the_modes_of_other_files(tmp_path: Path, tiny: Path) -> None:
    before = os.umask(0o027)
    try:
        assert call("run", tiny, "--runs-dir", tmp_path / "runs", "--set", "train.num_iterations=1").code == 0
    finally:
        os.umask(before)
    files = [path for path in only_run(tmp_path / "runs").rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o640" for path in files}


def test_a_manifest_says_what_it_needs_although_another_is_damaged(copy: Trained) -> None:
    (copy.path / "checkpoints/step_000012/manifest.json").write_text(json.dumps({"version": 3, "plugins": 7}))
    result = call("sample", "tiny", "one, ", "--runs-dir", copy.runs, "--max-tokens", 2)
    assert result.code == 0, result.err
