"""The guides' code is code that is installed: what ``plugins new`` writes, and the gallery's packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.install import install_fixture
from support import ROOT, Site, call, losses, metrics, only_run, write_experiment

from nanochat_core.scaffold import write_package

DOCS = ROOT / "docs" / "plugins"
GALLERY = ROOT / "tests" / "fixtures" / "gallery"
TUTORIALS = {
    "tokenizer": "frequent-words", "data_source": "lines", "model": "recurrent", "optimizer": "plain_sgd",
    "evaluator": "top-k", "logger": "records",
}  # fmt: skip


def files(page: Path) -> list[tuple[str, str]]:
    """Names and content of the files that a guide shows."""
    return re.findall(
        r"^`([\w/.-]+)`:\n\n```\w+\n(.*?)```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("kind", TUTORIALS)
def test_a_tutorial_shows_what_plugins_new_writes(kind: str, tmp_path: Path) -> None:
    package = write_package(kind, TUTORIALS[kind], tmp_path / "package")
    shown = files(DOCS / f"{kind}.md")
    assert len(shown) == 6
    for name, content in shown:
        assert content == (package / name).read_text(encoding="utf-8"), name


def test_the_gallery_shows_the_packages() -> None:
    shown = files(DOCS / "gallery.md")
    assert len(shown) == 12
    for name, content in shown:
        (file,) = GALLERY.glob(f"*/{name}")
        assert content == file.read_text(encoding="utf-8"), name


def test_the_packages_pass_their_own_tests(tmp_path: Path) -> None:
    copy = shutil.copytree(GALLERY, tmp_path / "gallery")
    path = ":".join(str(package) for package in copy.iterdir())
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", str(copy)]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_they_train_together(site: Site, tmp_path: Path, shards: Path) -> None:
    for package in GALLERY.iterdir():
        install_fixture(package, site.directory)
    (tmp_path / "quiz.jsonl").write_text('{"question": "one, ", "choices": ["two", "cat"], "answer": 0}\n' * 3)
    file = write_experiment(tmp_path / "tiny.toml", shards)
    settings = {
        "tokenizer.plugin": "characters",
        "model.plugin": "decay", "model.depth": 1, "model.width": 16,
        "evaluators.quiz.plugin": "quiz", "evaluators.quiz.every": 4, "evaluators.quiz.path": tmp_path / "quiz.jsonl",
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = call("run", file, "--runs-dir", tmp_path / "runs", *arguments)
    assert result.code == 0, result.err
    run = only_run(tmp_path / "runs")
    assert losses(run)[11] < losses(run)[0] - 0.3
    assert list(metrics(run, "quiz/accuracy")) == [4, 8, 12]


@pytest.mark.parametrize("name", ["wandb", "aim", "tensorboard", "csv"])
def test_loggers_are_swapped_by_one_line(name: str) -> None:
    lines = {other: (ROOT / "experiments" / "loggers" / f"{other}.toml").read_text() for other in ("csv", name)}
    changed = [
        pair for pair in zip(*(text.splitlines() for text in lines.values()), strict=True) if pair[0] != pair[1]
    ] if name != "csv" else []  # fmt: skip
    assert all("csv" in ours for ours, _ in changed)
    result = call("show", ROOT / "experiments" / "loggers" / f"{name}.toml")
    assert result.code == 0, result.err
    assert f'loggers.{name}.plugin = "{name}"' in result.out


def test_a_third_party_model_for_equal_flops(site: Site) -> None:
    install_fixture(GALLERY / "nanochat-decay", site.directory)
    ours = call("plan", ROOT / "experiments" / "quickstart.toml", "--set", "tokenizer.plugin=bytes")
    theirs = call("plan", ROOT / "experiments" / "decay.toml", "--set", "tokenizer.plugin=bytes")
    assert theirs.code == 0, theirs.err
    assert "(target_flops)" in theirs.out or "target_flops" in theirs.out
    assert ours.code == 0
