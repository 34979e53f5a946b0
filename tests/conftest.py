"""Shared by all tests: a home of their own, the third-party fixtures installed, and one small trained run."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: spinning threads starve each other
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only take turns
    os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.install import install_fixture
from helpers.support import BROKEN, THIRD_PARTY, Site, Trained, call, only_run, write_experiment, write_shards
from hypothesis import HealthCheck, settings

# What keeps files between processes. TorchInductor's cache is not here: it goes by content, and compiling takes long.
CACHES = ("NANOCHAT_HOME", "HF_HOME", "TIKTOKEN_CACHE_DIR", "XDG_CACHE_HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR",
          "WANDB_DATA_DIR")  # fmt: skip
# What a shell, a launcher or a service of another process sets.
FOREIGN = (
    "NANOCHAT_PLUGINS",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "MASTER_",
    "SLURM_",
    "TORCHELASTIC_",
    "HF_",
    "WANDB_",
)


def pytest_configure(config: pytest.Config) -> None:
    """Each test process has a home and caches of its own; neither they nor what the caller's shell sets are shared."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    home = tempfile.mkdtemp(prefix="nanochat-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ.update({name: f"{home}/{name.lower()}" for name in CACHES})
    os.environ["NANOCHAT_DEVICE"] = "cpu"
    # The same inputs each time, however busy the machine is.
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=checks, database=None)
    settings.load_profile("steady")


# Fixtures that start processes or install packages: the tests that share one go to one process of xdist.
SHARED = ("logged", "on_two_ranks", "whole", "short", "two", "installed", "alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))
        for name in SHARED:
            if name in getattr(item, "fixturenames", ()) and not item.get_closest_marker("xdist_group"):
                session = name in ("logged", "on_two_ranks")
                item.add_marker(pytest.mark.xdist_group(name if session else f"{name} of {item.path.stem}"))


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many inputs the fuzz tests that passed have tried, by surface."""
    tried: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call":
            tried.update({name[5:]: int(value) for name, value in report.user_properties if name.startswith("fuzz ")})
    if tried:
        terminalreporter.write_line("fuzzed: " + ", ".join(f"{name} {n:,}" for name, n in sorted(tried.items())))


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Called with the name of its surface, counts an input that a fuzz test tries; the summary shows the counts."""
    counts: Counter[str] = Counter()
    others = list(request.node.user_properties)

    def count(surface: str) -> None:
        counts[surface] += 1  # the report of the test is made before fixtures end, so that all must be there by then
        request.node.user_properties[:] = [*others, *((f"fuzz {name}", number) for name, number in counts.items())]

    return count
