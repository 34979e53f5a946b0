"""The guides' code is code that is installed: what ``plugins new`` writes, and the gallery's packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.install import install_fixture
from helpers.support import ROOT, Site, call, losses, metrics, only_run, write_experiment

from nanochat_core.plugins.scaffold import write_package

DOCS = ROOT / "docs" / "plugins"
GALLERY = ROOT / "tests" / "fixtures" / "gallery"
TUTORIALS = {
    "tokenizer": "frequent-words", "data_source": "lines", "model": "recurrent", "optimizer": "plain_sgd",
    "evaluator": "top-k", "logger": "records",
}  # fmt: skip


LOGGERS = sorted(file.stem for file in (ROOT / "experiments" / "loggers").glob("*.toml"))


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


@pytest.mark.parametrize("name", ["wandb", "aim", "tensorboard"])
def test_loggers_are_swapped_by_one_line(name: str) -> None:
    ours, other = (
        tomllib.loads((ROOT / "experiments" / "loggers" / f"{n}.toml").read_text()) for n in ("csv", name)
    )  # fmt: skip
    assert ours.pop("loggers") == [{"plugin": "csv"}]
    assert other.pop("loggers") == [{"plugin": name}]
    assert ours.pop("run") == {"name": "quickstart-csv", "group": "loggers"}
    assert other.pop("run") == {"name": f"quickstart-{name}", "group": "loggers"}
    assert ours == other


@pytest.mark.parametrize("name", LOGGERS)
def test_an_experiment_a_logger(name: str) -> None:
    result = call("show", ROOT / "experiments" / "loggers" / f"{name}.toml")
    assert result.code == 0, result.err
    assert f'loggers.{name}.plugin = "{name}"' in result.out


def total_flops(*arguments: object) -> float:
    planned = call("plan", *arguments)
    assert planned.code == 0, planned.err
    (total,) = re.findall(r"total FLOPs +(\S+)", planned.out)
    return float(total)


def test_a_third_party_model_for_equal_flops(site: Site) -> None:
    install_fixture(GALLERY / "nanochat-decay", site.directory)
    decay = ROOT / "experiments" / "decay.toml"
    theirs = total_flops(decay)
    assert total_flops(decay, "--set", "model.plugin=gpt", "--set", "model.depth=4") == pytest.approx(theirs, rel=0.01)
    assert total_flops(ROOT / "experiments" / "quickstart.toml") == pytest.approx(theirs, rel=0.01)
