"""Shared by all tests: a home of their own, the third-party fixtures installed, and one small trained run."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: spinning threads starve each other

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.install import install_fixture
from helpers.support import BROKEN, THIRD_PARTY, Site, Trained, call, only_run, write_experiment, write_shards


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches go to a temporary directory; what the caller's shell sets does not reach the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("NANOCHAT_DEVICE", "cpu")
        for name in ("NANOCHAT_PLUGINS", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of parquet shards that count out loud."""
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def tiny(shards: Path, tmp_path: Path) -> Path:
    """An experiment of twelve quick steps, with default plugins only."""
    return write_experiment(tmp_path / "tiny.toml", shards)


@pytest.fixture(scope="session")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run of ``tiny``, finished. Tests read it and leave it as it is."""
    directory = tmp_path_factory.mktemp("trained")
    file = write_experiment(directory / "tiny.toml", shards)
    runs = directory / "runs"
    result = call("run", file, "--runs-dir", runs)
    assert result.code == 0, result.err
    return Trained(file, runs, only_run(runs), result)


def _site(directory: Path, packages: Path) -> tuple[Path, str]:
    names = [install_fixture(package, directory) for package in sorted(packages.iterdir()) if package.is_dir()]
    return directory, ",".join(names)


@pytest.fixture(scope="session")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Site directory with the six third-party packages, and their entry points as ``NANOCHAT_PLUGINS`` takes them."""
    return _site(tmp_path_factory.mktemp("third_party"), THIRD_PARTY)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same with the broken packages."""
    return _site(tmp_path_factory.mktemp("broken"), BROKEN)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty directory on the path, for packages that a test makes up."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    made = Site(tmp_path / "site")
    yield made
    made.forget()
