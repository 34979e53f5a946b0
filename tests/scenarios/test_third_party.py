"""The core alone: six third-party plugins, one a kind, none of ours, through every command that touches a run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.support import Result, call, ledger, losses, metrics, only_run, spawn

EXPERIMENT = """
[tokenizer]
plugin = "chars"
vocab_size = 32

[data]
plugin = "counting"

[model]
plugin = "gru"
width = 32

[optimizer]
plugin = "sgd"

[train]
max_seq_len = 32
device_batch_size = 8
total_batch_size = 512
num_iterations = 30

[checkpoint]
save_every = 10

[[evaluators]]
plugin = "accuracy"
tokens = 1024
at_start = true

[[loggers]]
plugin = "jsonlines"
"""


class Alone:
    """A run by a real process that sees only the third-party plugins."""

    def __init__(self, directory: Path, site: tuple[Path, str]) -> None:
        self.directory = directory
        self.environment = {"PYTHONPATH": str(site[0]), "NANOCHAT_PLUGINS": site[1]}
        (directory / "others.toml").write_text(EXPERIMENT, encoding="utf-8")

    def __call__(self, *arguments: object) -> Result:
        path = os.pathsep.join(filter(None, (self.environment["PYTHONPATH"], os.environ.get("PYTHONPATH"))))
        return spawn(*arguments, cwd=self.directory, env={**self.environment, "PYTHONPATH": path})

    @property
    def run(self) -> Path:
        return only_run(self.directory / "runs")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, third_party: tuple[Path, str]) -> Alone:
    made = Alone(tmp_path_factory.mktemp("alone"), third_party)
    result = made("run", "others.toml")
    assert result.code == 0, result.err
    assert result.err == ""
    return made


@pytest.fixture
def here(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> Alone:
    """The same view in this process."""
    monkeypatch.syspath_prepend(alone.environment["PYTHONPATH"])
    monkeypatch.setenv("NANOCHAT_PLUGINS", alone.environment["NANOCHAT_PLUGINS"])
    monkeypatch.chdir(alone.directory)
    return alone


def own_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "tiny.jsonl").read_text().splitlines()]


def test_only_theirs_are_there(here: Alone) -> None:
    rows = [line.split()[:3] for line in call("plugins", "--check").out.splitlines()[1:]]
    assert rows == [
        ["tokenizer", "chars", "nanochat-tiny-tokenizer"],
        ["data_source", "counting", "nanochat-tiny-data"],
        ["model", "gru", "nanochat-tiny-model"],
        ["optimizer", "sgd", "nanochat-tiny-optimizer"],
        ["evaluator", "accuracy", "nanochat-tiny-evaluator"],
        ["logger", "jsonlines", "nanochat-tiny-logger"],
    ]


def test_it_trains(alone: Alone) -> None:
    found = losses(alone.run)
    assert list(found) == list(range(30))
    assert found[29] < found[0] - 0.5
    accuracy = metrics(alone.run, "val/accuracy")
    assert list(accuracy) == [0, 10, 20, 30]
    assert accuracy[30] > accuracy[0]


def test_a_model_without_roles_is_told_which_it_has(alone: Alone) -> None:
    line = "model gru declares no parameter roles; roles derived from shapes: embedding, head, matrix, scalar\n"
    assert (alone.run / "log.txt").read_text().count(line) == 1


def test_their_logger_mirrors_the_ledger(alone: Alone) -> None:
    first, *records, last = own_log(alone.run)
    assert first == {"run": "others", "id": alone.run.name, "start_step": 0}
    assert records == ledger(alone.run)
    assert last == {"status": "finished"}


def test_the_run_knows_whose_plugins_it_used(alone: Alone) -> None:
    facts = json.loads((alone.run / "provenance.json").read_text())
    assert facts["plugins"] == {
        f"nanochat-tiny-{kind}": "0.1.0" for kind in ("data", "evaluator", "logger", "model", "optimizer", "tokenizer")
    }


def test_show_and_plan_work_with_them(here: Alone) -> None:
    shown = call("show", "others.toml")
    assert shown.code == 0, shown.err
    assert "model.width = 32" in shown.out
    planned = call("plan", "others.toml", "--tok-per-sec", 512)
    assert planned.code == 0, planned.err
    assert "time: 30 s of training" in planned.out
    # embedding and head 32 x 32, GRU 6 x 32 x 32 and two biases of 3 x 32
    assert "8,384 (" in planned.out
    refused = call("plan", "others.toml", "--set", "train.total_batch_size=auto")
    assert refused.code == 2
    assert 'has no reference model, which "auto" needs: give a number of tokens' in refused.err


def test_runs_and_sample_work_without_a_cache(here: Alone) -> None:
    listed = call("runs")
    assert listed.out.splitlines()[1].split()[:5] == ["others", here.run.name, "finished", "30/30", "-"]
    result = call("sample", "others", "one, two, ", "--max-tokens", 20, "--temperature", 0)
    assert result.code == 0, result.err
    assert result.out.startswith("one, two, ")
    assert len(result.out) == len("one, two, ") + 20 + 1


def test_resume_to_a_longer_horizon(here: Alone, tmp_path: Path) -> None:
    shutil.copytree(here.directory / "runs", tmp_path / "runs")
    run = only_run(tmp_path / "runs")
    before = losses(run)
    result = call("run", "others.toml", "--runs-dir", tmp_path / "runs", "--resume", "--set", "train.num_iterations=40")
    assert result.code == 0, result.err
    after = losses(run)
    assert list(after) == list(range(40))
    assert {step: after[step] for step in before} == before
    assert {"run": "others", "id": run.name, "start_step": 30} in own_log(run)


def test_a_resumed_run_reaches_the_same_numbers(here: Alone, tmp_path: Path) -> None:
    def train(runs: str, steps: int, *more: str) -> Path:
        settings = ("--set", f"train.num_iterations={steps}", "--set", "schedule.warmdown_ratio=0")
        result = call("run", "others.toml", *settings, "--runs-dir", tmp_path / runs, *more)
        assert result.code == 0, result.err
        return only_run(tmp_path / runs)

    whole = train("whole", 20)
    train("parts", 10)
    parts = train("parts", 20, "--resume")
    assert losses(parts) == losses(whole)
    assert metrics(parts, "val/accuracy") == metrics(whole, "val/accuracy")


@pytest.mark.parametrize("rest", ["", "[model]\nplugin = 'gpt'\n"])
def test_our_plugins_are_unknown(here: Alone, tmp_path: Path, rest: str) -> None:
    (tmp_path / "x.toml").write_text(f'extends = "{here.directory / "others.toml"}"\n{rest}')
    result = call("run", tmp_path / "x.toml", "--set", "train.num_iterations=1", "--runs-dir", tmp_path / "runs")
    if rest:
        assert result.code == 2
        assert 'no model plugin "gpt" is installed (installed: gru)' in result.err
    else:
        assert result.code == 0, result.err
