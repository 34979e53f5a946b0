"""Observers and commands of plugins: told what happens, and unable to hurt."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.install import install_fixture
from helpers.support import ROOT, Site, Trained, call, losses, only_run, write_experiment

from nanochat_core.plugins.discovery import load_plugins

DIARY = ROOT / "tests" / "fixtures" / "observers" / "nanochat-diary"


@pytest.fixture
def diary(site: Site) -> None:
    install_fixture(DIARY, site.directory)


def train(tmp_path: Path, shards: Path, *more: str) -> tuple[str, Path]:
    file = write_experiment(tmp_path / "tiny.toml", shards)
    settings = ("--set", "train.num_iterations=6", "--set", "evaluators.samples.remove=true", *more)
    result = call("run", file, "--runs-dir", tmp_path / "runs", *settings)
    assert result.code == 0, result.err
    return result.out, only_run(tmp_path / "runs")


@pytest.mark.usefixtures("diary")
def test_an_observer_is_told_what_happens_in_order(tmp_path: Path, shards: Path) -> None:
    out, run = train(tmp_path, shards)
    said = (run / "diary.txt").read_text().splitlines()
    steps = [f"step {step}: train/tok_per_sec" for step in range(6)]
    assert said == [
        "tiny starts at step 0", "bpb at 0: ['val/bpb']",
        *steps[:4], "saved step_000004", "bpb at 4: ['val/bpb']",
        *steps[4:], "saved step_000006", "bpb at 6: ['val/bpb']", "finished",
    ]  # fmt: skip
    assert "observer-" not in out
    result = call("diary", run)
    assert (result.code, result.out.splitlines()) == (0, said)


@pytest.mark.usefixtures("diary")
@pytest.mark.parametrize(
    ("how", "reasons"),
    [
        ("raise", ["nanochat_step_finished failed, training continues: RuntimeError: no ink"]),
        ("die", ["died (7)", "it did not receive"]),
    ],
)
def test_an_observer_that_misbehaves_is_reported_and_left(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, how: str, reasons: list[str]
) -> None:
    monkeypatch.setenv("DIARY", how)
    out, run = train(tmp_path, shards)
    assert set(losses(run)) == set(range(6))
    told = [line for line in out.splitlines() if "observer-diary" in line]
    assert len(told) == len(reasons)
    assert all(reason in line for line, reason in zip(told, reasons, strict=True))
    if how == "raise":  # it goes on with the next event
        assert (run / "diary.txt").read_text().splitlines()[-1] == "finished"


def test_without_observers_there_is_no_process(tmp_path: Path, shards: Path) -> None:
    _, run = train(tmp_path, shards)
    assert not (run / "loggers").exists()
    assert load_plugins().observers == []


@pytest.mark.usefixtures("diary")
def test_a_command_of_a_plugin_is_one_of_ours(trained: Trained) -> None:
    assert "print the diary of a run" in call("--help").out
    assert "directory of a run" in call("diary", "--help").out
    result = call("diary", trained.path)
    assert result.code == 2
    assert "this run has no diary" in result.err


COMMAND = """
@hookimpl
def nanochat_register_commands(cli):
    cli.add("{}", module="x", summary="mine")
"""


def test_commands_that_clash_are_left_out(site: Site) -> None:
    install_fixture(DIARY, site.directory)
    site.add("again", COMMAND.format("diary"), point="z_again")
    site.add("ours", COMMAND.format("run"), point="z_ours")
    plugins = load_plugins()
    (failure,) = plugins.failures
    assert "nanochat-diary (plugin 'diary') has a command 'diary' already" in str(failure)
    result = call("--help")
    assert "command 'run' of ours (plugin 'z_ours') is left out" in result.err
    assert "train an experiment" in result.out


def test_a_misspelt_hook_is_reported(site: Site) -> None:
    site.add("made-up", "@hookimpl\ndef nanochat_run_stated(context): pass\n")
    (failure,) = load_plugins().failures
    assert 'did you mean "nanochat_run_started"' in str(failure)
