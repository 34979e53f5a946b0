"""Plugins that are broken in one way each, installed as packages: each costs a line, and takes nothing along."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from helpers.install import install_fixture
from helpers.support import BROKEN, ROOT, THIRD_PARTY, Site, call, only_run, spawn, write_experiment

from nanochat_core.plugins.discovery import load_plugins

SLOW = ROOT / "tests" / "fixtures" / "slow" / "nanochat-slow-import"
REASONS = {
    "nanochat-broken-import": "surely_missing_module",
    "nanochat-broken-hook-name": "unknown hook 'nanochat_register_modles'",
    "nanochat-broken-hook-signature": "device",
    "nanochat-broken-reserved-field": "field 'plugin'",
    "nanochat-broken-untypable-field": r"TOML can't fill field 'colour' of type .*complex",
    "nanochat-broken-newer-api": (
        r"written for hook API 2, nanochat 0\.1\.0 has 1: install a version of nanochat-broken-newer-api for hook API "
        r"1, or a newer nanochat with hook API 2"
    ),
    "nanochat-broken-newer-core": r"requires nanochat <10,>=9, this is 0\.1\.0: pip install 'nanochat-core<10,>=9'",
}


def test_all_of_them_at_once_stop_nobody(site: Site, tmp_path: Path, shards: Path) -> None:
    for package in [*BROKEN.iterdir(), SLOW, *THIRD_PARTY.iterdir()]:
        install_fixture(package, site.directory)
    plugins = load_plugins()
    failures = {failure.distribution: str(failure) for failure in plugins.failures}
    assert failures.keys() == REASONS.keys()
    for package, reason in REASONS.items():
        assert re.search(reason, failures[package]), failures[package]
        assert "\n" not in failures[package]
    assert plugins["model"].get("gru") is not None
    assert plugins["model"].clashes() == ["gpt"]  # nanochat-broken-name-clash: refused when it is used, by name
    file = write_experiment(tmp_path / "tiny.toml", shards)
    clash = call("show", file)
    assert clash.code == 2
    assert "nanochat-broken-name-clash" in clash.err
    third = ("--set", "model.plugin=gru", "--set", "train.num_iterations=2", "--set", "evaluators.samples.remove=true")
    result = call("run", file, "--runs-dir", tmp_path / "runs", *third)
    assert result.code == 0, result.err
    assert len([line for line in result.err.splitlines() if "failed to load" in line]) == len(REASONS)


def test_a_factory_that_raises_is_told_in_a_line_with_its_place(site: Site, tmp_path: Path, shards: Path) -> None:
    install_fixture(BROKEN / "nanochat-broken-factory", site.directory)
    file = write_experiment(tmp_path / "tiny.toml", shards)
    result = call("run", file, "--runs-dir", tmp_path / "runs", "--set", "model.plugin=raising")
    assert result.code == 2
    assert "model 'raising' of nanochat-broken-factory 0.1.0 can't be built" in result.err
    assert re.search(r"ZeroDivisionError: .* \(.*nanochat_broken_factory/model.py:\d+\)", result.err)
    assert "Traceback" not in result.err


def test_timings_name_slow_imports(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the plugin's own ``time.sleep`` moves."""
    install_fixture(SLOW, site.directory)
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    said = call("plugins", "--timings").out.splitlines()
    assert re.fullmatch(r" +0\.300  slow_import of nanochat-slow-import 0\.1\.0  slow: .*", said[1])
    assert any(re.fullmatch(r" +0\.000  gpt of nanochat\S* \S+", line) for line in said)


def test_a_checkpoint_names_what_it_needs(tmp_path: Path, third_party: tuple[Path, str], shards: Path) -> None:
    file = write_experiment(tmp_path / "tiny.toml", shards)
    path = os.pathsep.join(filter(None, (str(third_party[0]), os.environ.get("PYTHONPATH"))))
    settings = (
        "--set",
        "model.plugin=gru",
        "--set",
        "train.num_iterations=2",
        "--set",
        "evaluators.samples.remove=true",
    )
    made = spawn("run", file, "--runs-dir", tmp_path / "runs", *settings, env={"PYTHONPATH": path})
    assert made.code == 0, made.err
    run = only_run(tmp_path / "runs")
    manifest = json.loads((run / "checkpoints" / "step_000002" / "manifest.json").read_text())
    assert manifest["plugins"] == {"nanochat-core": "0.1.0", "nanochat-tiny-model": "0.1.0"}
    for command in (("sample", "tiny", "x"), ("run", file, *settings, "--resume")):
        result = call(*command, "--runs-dir", tmp_path / "runs")
        assert result.code == 2
    assert "no model plugin" in result.err
    result = call("sample", "tiny", "x", "--runs-dir", tmp_path / "runs")
    assert "made with nanochat-tiny-model 0.1.0, which is not installed: pip install nanochat-tiny-model==0.1.0" in (
        result.err
    )
    shutil.rmtree(run)
