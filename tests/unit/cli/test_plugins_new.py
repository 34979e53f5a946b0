"""``nanochat plugins new``: each scaffold is installed by pip into a venv, tested there, and trained with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.support import call, losses, only_run

NAMES = {
    "tokenizer": "frequent-words",
    "data_source": "lines",
    "model": "recurrent",
    "optimizer": "plain_sgd",
    "evaluator": "top-k",
    "logger": "records",
}
RUN_ALL = """
import sys
from pathlib import Path
from nanochat_core.cli import main
for file in map(Path, sys.argv[2:]):
    own = ["--set", "data.path=" + sys.argv[1]]
    if "lines" not in file.parent.name:
        own += ["--set", "data.plugin=lines"]
    code = main(["run", str(file), "--runs-dir", str(file.parent / "runs"), "--set", "train.num_iterations=3",
                 "--set", "train.total_batch_size=1024", "--set", "train.compile=false", *own])
    assert code == 0, file
"""


class Venv:
    """A virtual environment that sees this one's packages through a .pth file."""

    def __init__(self, directory: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        self.python = directory / "bin" / "python"
        (site,) = directory.glob("lib/python*/site-packages")
        ours = next(p for p in map(Path, sys.path) if p.name == "site-packages")
        (site / "outer.pth").write_text(f"import site; site.addsitedir({str(ours)!r})\n")

    def __call__(self, *arguments: object, cwd: Path | None = None) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        done = subprocess.run(
            [self.python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *packages: object) -> None:
        self("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", *packages)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Venv, dict[str, Path]]:
    """The venv with a fresh scaffold of each kind, and where their sources are."""
    directory = tmp_path_factory.mktemp("new")
    sources = {}
    for kind, name in NAMES.items():
        sources[kind] = directory / f"nanochat-{name.replace('_', '-')}"
        result = call("plugins", "new", kind.replace("_", "-"), name, sources[kind])
        assert result.code == 0, result.err
        assert f"pip install -e {sources[kind]}" in result.out
    venv = Venv(directory / "venv")
    venv.install(*sources.values())
    return venv, sources


def test_the_packages_are_found_with_their_options(installed: tuple[Venv, dict[str, Path]], tmp_path: Path) -> None:
    venv, _ = installed
    listed = venv("-m", "nanochat_core", "plugins", "--check", cwd=tmp_path)
    rows = [line.split()[:3] for line in listed.splitlines()]
    for kind, name in NAMES.items():
        assert [kind, name, f"nanochat-{name.replace('_', '-')}"] in rows
    assert "val" in venv("-m", "nanochat_core", "plugins", "evaluator/top-k", cwd=tmp_path)
    assert not any(name in call("plugins").out for name in ("frequent-words", "plain_sgd"))  # the venv is its own


def test_their_own_tests_pass(installed: tuple[Venv, dict[str, Path]], tmp_path: Path) -> None:
    venv, sources = installed
    said = venv("-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", *sources.values(), cwd=tmp_path)
    assert "9 passed" in said


def test_experiments_that_use_them_train(installed: tuple[Venv, dict[str, Path]], tmp_path: Path) -> None:
    venv, sources = installed
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"{i} bottles of beer on the wall, take {i % 7} down\n" for i in range(1500)))
    said = venv("-c", RUN_ALL, lines, *(source / "experiment.toml" for source in sources.values()), cwd=tmp_path)
    for source in sources.values():
        assert set(losses(only_run(source / "runs"))) == {0, 1, 2}
    assert "val/top_5" in (only_run(sources["evaluator"] / "runs") / "metrics.jsonl").read_text()
    assert '{"status": "finished"}' in (only_run(sources["logger"] / "runs") / "records.jsonl").read_text()
    assert "misses" not in said


def test_a_scaffold_is_clean(installed: tuple[Venv, dict[str, Path]]) -> None:
    for source in installed[1].values():
        for file in source.rglob("*.*"):
            if file.suffix in (".py", ".toml", ".md"):
                text = file.read_text()
                assert "$" not in text
                assert max(map(len, text.splitlines())) <= 120


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("modl", "x"), "no kind 'modl' (did you mean \"model\"?)"),
        (("model", "My Model"), "small letters"),
        (("model",), "write: nanochat plugins new KIND NAME [DIR]"),
        (("model", "x", "."), "exists and is not empty"),
    ],
)
@pytest.mark.usefixtures("here")
def test_mistakes_are_said(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("plugins", "new", *arguments)
    assert result.code == 2
    assert reason in result.err
