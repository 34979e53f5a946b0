"""One run that all loggers follow: interrupted after step 7, resumed from its checkpoint of step 4."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.support import call, only_run, write_experiment

LOGGERS = """
[[loggers]]
plugin = "wandb"
system_metrics = false
timeout = 300

[[loggers]]
plugin = "aim"
system_metrics = false
timeout = 300

[[loggers]]
plugin = "tensorboard"
timeout = 300

[[loggers]]
plugin = "csv"
timeout = 300
"""
SETTINGS = (
    "--set", "schedule.warmdown_ratio=0", "--set", "run.group=arms", "--set", "run.tags=['a', 'b']",
)  # fmt: skip


@pytest.fixture(scope="session")
def logged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory."""
    directory = tmp_path_factory.mktemp("logged")
    file, runs = write_experiment(directory / "tiny.toml", shards, LOGGERS), directory / "runs"
    without = [s for name in ("wandb", "aim") if not _installed(name) for s in ("--set", f"loggers.{name}.remove=true")]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(directory / "none"))
        arguments = ("run", file, "--runs-dir", runs, *SETTINGS, *without)
        first = call(*arguments, "--set", "train.num_iterations=8")
        assert first.code == 0, first.err
        if _installed("wandb"):
            assert "logger wandb: offline, because there is no key" in first.out
        shutil.rmtree(only_run(runs) / "checkpoints" / "step_000008")
        second = call(*arguments, "--set", "train.num_iterations=12", "--resume")
        assert second.code == 0, second.err
        for line in (first.out + second.out).splitlines():
            assert "has missed" not in line, line
    return only_run(runs)


def _installed(name: str) -> bool:
    from nanochat_core.plugins.discovery import load_plugins

    entry = load_plugins()["logger"].get(name)
    return entry is not None and not entry.missing()
