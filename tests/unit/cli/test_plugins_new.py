"""``nanochat plugins new``: each scaffold is installed by pip into a venv, tested there, and trained with."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.support import ROOT, call, losses, only_run

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


OURS = next(path for path in map(Path, sys.path) if path.name == "site-packages")


class Venv:
    """A virtual environment that sees this one's packages through a .pth file."""

    drop = ("PIP_",)  # variables that it does not get

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        self.python = directory / "bin" / "python"
        (site,) = directory.glob("lib/python*/site-packages")
        (site / "outer.pth").write_text(self.outer())

    def outer(self) -> str:
        return f"import site; site.addsitedir({str(OURS)!r})\n"

    def __call__(self, *arguments: object, cwd: Path | None = None) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(self.drop)}
        done = subprocess.run(
            [self.python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *packages: object) -> None:
        self("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", *packages)


class FreshVenv(Venv):
    """One that has everything but nanochat, as a new user's would after installing the libraries."""

    drop = ("PIP_", "PYTHONPATH")

    def outer(self) -> str:
        packages = self.directory / "libraries"
        packages.mkdir()
        for path in OURS.iterdir():
            if "nanochat" not in path.name and path.suffix != ".pth":
                (packages / path.name).symlink_to(path)
        return f"{packages}\n"


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


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for pip's --find-links: our wheel, and one of the other project that is called nanochat."""
    directory = tmp_path_factory.mktemp("index")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", directory, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(directory / "nanochat-0.1.2-py3-none-any.whl", "w") as other:
        other.writestr("nanochat/__init__.py", "")
        info = "nanochat-0.1.2.dist-info"
        other.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nanochat\nVersion: 0.1.2\n")
        other.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        other.writestr(f"{info}/RECORD", "")
    return directory


def test_the_wheel_has_every_file(index: Path) -> None:
    """Templates, the stub of the public names and ``py.typed`` too."""
    (wheel,) = index.glob("nanochat_core-*.whl")
    with zipfile.ZipFile(wheel) as content:
        packed = {name for name in content.namelist() if ".dist-info/" not in name}
    sources = [(ROOT, file) for file in (ROOT / "nanochat_core").rglob("*")]
    sources += [(ROOT / "plugins", file) for file in (ROOT / "plugins").rglob("*")]
    files = {
        file.relative_to(root).as_posix() for root, file in sources if file.is_file() and "__pycache__" not in str(file)
    }
    assert packed == files
    assert {"nanochat_core/__init__.pyi", "nanochat_core/py.typed", "nanochat_core/runs/checkpoint.py"} <= packed
    assert "nanochat_core/plugins/scaffold/common/pyproject.toml.txt" in packed


@pytest.fixture(scope="module")
def fresh(index: Path, tmp_path_factory: pytest.TempPathFactory) -> FreshVenv:
    """A venv with a scaffold, whose dependency on the core was found by pip."""
    directory = tmp_path_factory.mktemp("fresh")
    source = directory / "nanochat-top-k"
    assert call("plugins", "new", "evaluator", "top-k", source).code == 0
    venv = FreshVenv(directory / "venv")
    install = ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-compile", "--no-index")
    venv(*install, "--find-links", index, source)
    return venv


def test_pip_finds_the_core_of_a_scaffold(fresh: FreshVenv, tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print(sorted(d.name for d in m.distributions() if 'nanochat' in d.name))"
    assert fresh("-c", code, cwd=tmp_path) == "['nanochat-core', 'nanochat-top-k']\n"  # and not nanochat
    listed = fresh(fresh.directory / "bin" / "nanochat", "plugins", "--check", cwd=tmp_path)
    rows = [line.split()[:4] for line in listed.splitlines()]
    assert ["evaluator", "top-k", "nanochat-top-k", "0.1.0"] in rows
    assert ["model", "gpt", "nanochat-core", "0.1.0"] in rows
    where = fresh("-c", "import nanochat_core; print(nanochat_core.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(fresh.directory)


def test_a_type_checker_sees_the_public_names(fresh: FreshVenv, tmp_path: Path) -> None:
    """In a package of somebody else, through ``py.typed`` and the stub."""
    pytest.importorskip("mypy", reason="mypy is in the extra dev")
    skipped = "".join(f"[mypy-{library}.*]\nfollow_imports = skip\n" for library in ("torch", "numpy", "safetensors"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n{skipped}")  # for speed
    (tmp_path / "theirs.py").write_text(
        "import nanochat_core\nfrom nanochat_core import HOOK_API, Registrar, score_choices\n"
        "from nanochat_core.testing import check_logger\n"
        "def f(registry: Registrar) -> None:\n    registry.add('x', config=int, factory=3)\n"
        "reveal_type(HOOK_API)\nreveal_type(score_choices)\nreveal_type(check_logger)\nnanochat_core.nonsense\n"
    )
    check = "import sys; from mypy.api import run; sys.stdout.write(run(sys.argv[1:])[0])"  # whatever its exit code
    said = fresh("-c", check, "--no-incremental", "theirs.py", cwd=tmp_path)
    assert 'theirs.py:5: error: Argument "factory" to "add" of "Registrar" has incompatible type "int"' in said
    assert 'theirs.py:6: note: Revealed type is "int"' in said
    assert 'theirs.py:7: note: Revealed type is "def (model: nanochat_core.interfaces.model.Model, ' in said
    assert 'theirs.py:8: note: Revealed type is "def (factory: ' in said
    assert 'theirs.py:9: error: Module has no attribute "nonsense"' in said
    assert "Found 2 errors in 1 file" in said


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
        (("modl", "x"), "there is no kind of plugin 'modl' (did you mean \"model\"?)"),
        (("model", "My Model"), "lower-case letters"),
        (("model",), "usage: nanochat plugins new KIND NAME [DIR]"),
        (("model", "x", "."), "exists and is not empty"),
        (("model", "core"), "nanochat-core is nanochat's own distribution"),
    ],
)
@pytest.mark.usefixtures("here")
def test_mistakes_are_said(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("plugins", "new", *arguments)
    assert result.code == 2
    assert reason in result.err


@pytest.mark.parametrize("name", ["bytes", "core", "gpt"])
def test_an_installed_package_is_not_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("plugins", "new", "tokenizer", name)
    assert result.code == 2
    assert "choose another name" in result.err
    assert list(tmp_path.iterdir()) == []
