"""A run that is not under --runs-dir: what a command would do by its word is shown, and done only if it is trusted."""

from __future__ import annotations

import io
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers.fuzzing import snapshot
from helpers.support import Result, Trained, call

COMMANDS = [
    ("eval",),
    ("sample", "one, ", "--max-tokens", "2"),
    ("log-sync", "--to", "csv"),
    ("tokenizer show", "one"),
    ("tokenizer compare",),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def foreign(trained: Trained, tmp_path: Path) -> Path:
    """A run as from somebody else, whose experiment names a directory to write to."""
    run = tmp_path / "theirs" / "tiny" / trained.path.name
    shutil.copytree(trained.path, run)
    change(run, lambda tables: tables["loggers"].append({"plugin": "csv", "directory": str(tmp_path / "there")}))
    return run


def change(run: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Change the experiment of a run."""
    tables = tomllib.loads((run / "experiment.toml").read_text())
    how(tables)
    (run / "experiment.toml").write_text(tomli_w.dumps(tables))


def run_on(command: tuple[str, ...], run: Path, *more: object) -> Result:
    name, *rest = command
    return call(*name.split(), run, *rest, *more)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_foreign_run_is_shown_and_refused(command: tuple[str, ...], foreign: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    result = run_on(command, foreign, "--runs-dir", tmp_path / "runs")
    assert result.code == 2
    assert f"nanochat {command[0]} would\n  run    the installed plugins" in result.err
    assert f"  read   '{foreign}'" in result.err
    assert result.err.rstrip().endswith("add --trust if you trust it")
    assert snapshot(tmp_path) == before
    if command[0] == "eval":
        assert "tokenizer 'bytes', model 'gpt', data 'parquet', evaluators.bpb 'bpb', evaluators.samples" in result.err
        assert f"  write  '{foreign / 'evaluations'}'" in result.err
        assert "  with   data.path = '" in result.err
    if command[0] == "log-sync":
        assert f"  with   loggers.csv.directory = '{tmp_path / 'there'}'" in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_foreign_run_that_is_trusted(command: tuple[str, ...], foreign: Path, tmp_path: Path) -> None:
    result = run_on(command, foreign, "--runs-dir", tmp_path / "runs", "--trust")
    assert result.code == 0, result.err
    assert "would" not in result.err
    assert run_on(command, foreign, "--runs-dir", foreign.parents[1]).code == 0  # it is named as ours


def test_a_link_does_not_make_a_run_ours(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(foreign.parent)
    for reference in ("tiny", f"tiny/{foreign.name}"):
        assert call("sample", reference, "x", "--runs-dir", tmp_path / "runs").code == 2


def test_a_checkpoint_of_a_foreign_run(foreign: Path, tmp_path: Path) -> None:
    checkpoint = max(foreign.glob("checkpoints/step_*"))
    assert "would\n" in call("eval", checkpoint, "--runs-dir", tmp_path / "runs").err
    assert "would\n" in call("eval", checkpoint, "--runs-dir", tmp_path / "runs", "--nproc", "2").err


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("yes\n", 0), ("\n", 2), ("n\n", 2), ("", 2)])
def test_at_a_terminal_it_asks(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(io, "StringIO", Terminal)  # where ``call`` collects what a command says
    result = call("sample", foreign, "one, ", "--max-tokens", "1", "--runs-dir", tmp_path / "runs")
    assert result.code == code, result.err
    assert "Go on? [y/N] " in result.err
    assert ("nothing was done" in result.err) is (code == 2)


def test_words_of_a_foreign_run_are_shown_safely(foreign: Path, tmp_path: Path) -> None:
    paths = [f"{tmp_path}/{i}\x1b[2J" for i in range(100)]
    change(foreign, lambda tables: tables["data"].update(path=paths))
    result = call("eval", foreign, "--runs-dir", tmp_path / "runs")
    assert result.code == 2
    assert "\x1b" not in result.err
    assert "data.path = '" in result.err
    assert "more options" in result.err


def test_a_model_does_not_steer_the_terminal(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("sample", "tiny", "a\x1b[2J\n", "--max-tokens", "1", "--runs-dir", trained.runs)
    assert call(*command).out.startswith("a\x1b[2J\n")  # a pipe gets the text
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert call(*command).out.startswith("a\\x1b[2J\n")
