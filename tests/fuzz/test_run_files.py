"""Every file of a run and of its checkpoints, changed in every way: each command works or says what is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzzing import inputs, snapshot, well_behaved
from helpers.sealing import seal
from helpers.support import Trained
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.files import remove

pytestmark = pytest.mark.fuzz

ODD: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, 1e308, float("nan"), float("-inf"), "", "x", "\x1b[2J", "../../x", "/dev/zero",
    "²", "é" * 300, [], [1], {}, {"a": {}}, [[[[]]]], "x" * 5000,
]  # fmt: skip


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------------- changes


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 3, 30])):
        if data:
            data[min(int(draw.random() ** draw.choice([1, 4]) * len(data)), len(data) - 1)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, int(draw.random() * path.stat().st_size))


def extend(path: Path, draw: random.Random) -> None:
    with path.open("ab") as file:
        file.write(draw.choice([b"\0" * 600 + b"\n", b"garbage\n", b"\xff\xfe\n", b"[]\n", b"{}\n", b"\n"]))


def replace(path: Path, draw: random.Random) -> None:
    odd = [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"1",
        b'"x"',
        b"[" * 100_000,
        b"\0" * 100,
        b"\xff\xfe",
        b'{"step": ' + b"9" * 6000,
    ]
    path.write_bytes(draw.choice(odd))


def swap(path: Path, draw: random.Random) -> None:
    """Something else in its place."""
    remove(path)
    kind = draw.choice(["directory", "pipe", "zeros", "dangling", "loop", "nothing", "full directory"])
    if kind.endswith("directory"):
        path.mkdir()
        if kind.startswith("full"):
            (path / "x").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"zeros": "/dev/zero", "dangling": "nowhere", "loop": path.name}[kind])


def edit(path: Path, draw: random.Random) -> None:
    """Another value somewhere in JSON or in a line of JSON; elsewhere a line is repeated or left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        return flip(path, draw)
    lines = text.splitlines(keepends=True)
    if not lines:
        return
    if path.suffix == ".json":
        content = json.loads(text)
        change(content, draw)
        path.write_text(json.dumps(content), encoding="utf-8")
        return
    index = draw.randrange(len(lines))
    if path.suffix == ".jsonl":
        content = json.loads(lines[index])
        change(content, draw)
        lines[index] = json.dumps(content) + "\n"
    else:
        lines[index] = draw.choice(["", lines[index] * 2, draw.choice(lines)])
    path.write_text("".join(lines), encoding="utf-8")


def change(content: Any, draw: random.Random) -> None:
    while isinstance(content, dict | list) and content:
        key = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
        if draw.random() < 0.5 and isinstance(content[key], dict | list) and content[key]:
            content = content[key]
            continue
        if draw.random() < 0.2:
            del content[key]
        else:
            content[key] = draw.choice(ODD)
        return


def stray(path: Path, draw: random.Random) -> None:
    """Something of an odd name beside it."""
    name = draw.choice(
        ["step_²²²²²²", "step_x", "step_000099", ".x", "x\n", "\x1b[2J", "-rf", "evaluation.json", "a.json"]
    )
    other = path.with_name(name)
    if not other.exists():
        other.mkdir() if draw.random() < 0.5 else other.write_text("x")


CHANGES: list[Callable[[Path, random.Random], None]] = [flip, truncate, extend, replace, swap, edit, edit, stray]


@pytest.fixture(scope="module")
def original(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with the trained run, evaluated, of which only two small checkpoints are left."""
    runs = tmp_path_factory.mktemp("original") / "runs"
    shutil.copytree(trained.runs, runs)
    (run,) = (runs / "tiny").iterdir()
    shutil.rmtree(run / "checkpoints/step_000004")
    well_behaved("eval", run, "--evaluator", "bpb", "--runs-dir", runs, codes=(0,))
    return runs


def fuzzed(runs: Path, draw: random.Random) -> Path:
    """Change one to three files of the run in a runs directory. Returns the run."""
    (run,) = (runs / "tiny").iterdir()
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if not files_of(run):
            break
        path = run / draw.choice([name for name in files_of(run) if name != "lock" or draw.random() < 0.1])
        try:
            draw.choice(CHANGES)(path, draw)
        except (ValueError, RecursionError):  # no JSON any more, because of an earlier change
            flip(path, draw)
        if draw.random() < 0.05:
            swap(draw.choice(sorted(path for path in run.rglob("*") if path.is_dir() or path.is_file())), draw)
        checkpoint = path.parent
        if not path.parent.is_dir():
            break
        if checkpoint.parent.name == "checkpoints" and draw.random() < 0.6 and (checkpoint / "manifest.json").is_file():
            try:
                seal(checkpoint)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # the manifest itself was changed
    return run


def tried_out(original: Path, tmp: Path, seed: int, *command: str) -> tuple[Path, dict[str, str]]:
    runs = tmp / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(original, runs, symlinks=True)
    run = fuzzed(runs, random.Random(seed))
    before = snapshot_of(runs)
    well_behaved(*command, "--runs-dir", runs)
    return run, before


def snapshot_of(directory: Path) -> dict[str, str]:
    """As ``snapshot``, of regular files only: a link may lead to a device."""
    links = {path: path.readlink() for path in directory.rglob("*") if path.is_symlink()}
    for path in links:
        path.unlink()
    try:
        return snapshot(directory)
    finally:
        for path, target in links.items():
            path.symlink_to(target)


@given(seed=st.integers(0, 2**40))
@inputs(60)
def test_runs_lists_all(original: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, tried) -> None:  # type: ignore[no-untyped-def]
    tried("runs: runs")
    tmp = tmp_path_factory.getbasetemp() / "fuzz"
    _, before = tried_out(original, tmp, seed, "runs")
    assert snapshot_of(tmp / "runs") == before


@given(seed=st.integers(0, 2**40))
@inputs(40)
def test_sample_reads_or_refuses(original: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, tried) -> None:  # type: ignore[no-untyped-def]
    tried("runs: sample")
    tmp = tmp_path_factory.getbasetemp() / "fuzz"
    _, before = tried_out(original, tmp, seed, "sample", "tiny", "one, ", "--max-tokens", "2")
    assert snapshot_of(tmp / "runs") == before


@given(seed=st.integers(0, 2**40))
@inputs(30)
def test_eval_and_compare_read_or_refuse(
    original: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    tried,  # type: ignore[no-untyped-def]
) -> None:
    tried("runs: eval")
    tmp = tmp_path_factory.getbasetemp() / "fuzz"
    run, before = tried_out(original, tmp, seed, "eval", "tiny", "--evaluator", "bpb")
    after = snapshot_of(tmp / "runs")
    mine = f"tiny/{run.name}/evaluations"
    assert {k: v for k, v in after.items() if not k.startswith(mine)} == {
        k: v for k, v in before.items() if not k.startswith(mine)
    }
    tried_out(original, tmp, seed, "eval", "--compare", str(tmp / "runs" / "tiny"), str(original / "tiny"))


@given(seed=st.integers(0, 2**40))
@inputs(20)
def test_a_resume_goes_on_or_refuses(
    original: Path,
    trained: Trained,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    tried,  # type: ignore[no-untyped-def]
) -> None:
    tried("runs: resume")
    tmp = tmp_path_factory.getbasetemp() / "fuzz"
    more = ("--set", "train.num_iterations=13", "--set", "train.compile=false")
    run, before = tried_out(original, tmp, seed, "run", str(trained.file), "--resume", *more)
    after = snapshot_of(tmp / "runs")
    gone = before.keys() - after.keys()
    assert not {name for name in gone if not Path(name).name.startswith(".") and "step_000012" not in name}
    kept = (f"tiny/{run.name}/checkpoints/", f"tiny/{run.name}/tokenizer/", f"tiny/{run.name}/evaluations")
    for name in (name for name in before if name.startswith(kept)):
        if "step_000012" not in name:  # which may have been damaged, and is then written anew
            assert after[name] == before[name], name


@given(seed=st.integers(0, 2**40))
@inputs(8)
def test_log_sync_sends_or_refuses(original: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, tried) -> None:  # type: ignore[no-untyped-def]
    tried("runs: log-sync")
    tmp = tmp_path_factory.getbasetemp() / "fuzz"
    run, before = tried_out(original, tmp, seed, "log-sync", "tiny", "--to", "csv")
    after = snapshot_of(tmp / "runs")
    mine = (f"tiny/{run.name}/loggers", f"tiny/{run.name}/csv")
    assert {k: v for k, v in after.items() if not k.startswith(mine)} == {
        k: v for k, v in before.items() if not k.startswith(mine)
    }
