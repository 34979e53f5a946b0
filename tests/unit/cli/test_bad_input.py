"""Whatever a user gets wrong: exit code 2, file, line, key and remedy, no traceback, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.support import Result, call, spawn, write_experiment

EDITS: dict[str, tuple[str, str, str]] = {  # old text, new text, message
    "unknown key": (
        "depth = 1",
        "dept = 1",
        'x.toml:14: model.dept: unknown key of model plugin "gpt" (did you mean "depth"?)',
    ),
    "wrong type": (
        "depth = 1",
        'depth = "one"',
        'x.toml:14: model.depth: must be int, not "one"',
    ),
    "out of range": (
        "depth = 1",
        "depth = 0",
        "x.toml:14: model.depth: must be at least 1, not 0",
    ),
    "unknown table": (
        "[model]",
        "[modell]",
        'modell: unknown table (did you mean "model"?)',
    ),
    "unknown plugin": (
        '"muon_adamw"',
        '"muonadamw"',
        'x.toml:19: optimizer.plugin: no optimizer plugin "muonadamw" is installed (did you mean "muon_adamw"?)',
    ),
    "no TOML": (
        "depth = 1",
        "depth == 1",
        "x.toml:14: not valid TOML",
    ),
    "two horizons": (
        "num_iterations = 12",
        "num_iterations = 12\ntarget_flops = 1e9",
        "x.toml:26: train.target_flops: give one of num_iterations, target_flops, "
        "target_param_data_ratio, not several: num_iterations (",
    ),
    "accumulation": (
        "device_batch_size = 4",
        "device_batch_size = 3",
        "x.toml:23: train.device_batch_size: total_batch_size 256 / (device_batch_size 3 x max_seq_len "
        "32) is not a whole number of accumulation steps; device_batch_size 1, 2, 4 would work, or "
        "total_batch_size 192 or 288",
    ),
    "no multiple of the row": (
        "total_batch_size = 256",
        "total_batch_size = 250",
        "x.toml:24: train.total_batch_size: 250 is not a multiple of max_seq_len 32; use 224 or 256",
    ),
    "tokenizer and model": (
        "depth = 1",
        "depth = 1\nvocab_size = 100",
        "x.toml:15: model.vocab_size: ",
    ),
    "heads": (
        "depth = 1",
        "depth = 1\nn_kv_head = 3",
        "model.n_kv_head",
    ),
    "two entries of one name": (
        "[[loggers]]",
        '[[loggers]]\nplugin = "console"\n[[loggers]]',
        "x.toml:44: loggers.console: two entries have this name",
    ),
    "a missing base": (
        "[run]",
        'extends = "basis.toml"\n[run]',
        "x.toml:2: extends: no file",
    ),
    "no such data": (
        "/shards",
        "/nothing-there",
        "x.toml:10: data.path: ",
    ),
    "a value too small for bpe": (
        'plugin = "bytes"',
        'plugin = "bpe"\nvocab_size = 12',
        "x.toml:7: tokenizer.vocab_size: must be at least 265",
    ),
}


@pytest.fixture
def mistake(tmp_path: Path) -> Callable[[str, str], Path]:
    """The tiny experiment as ``x.toml`` with one edit."""
    (tmp_path / "shards").mkdir()
    for index in range(2):
        table = pa.table({"text": ["one, two, three. " * 9] * 16})
        pq.write_table(table, tmp_path / "shards" / f"{index}.parquet")

    def make(old: str, new: str) -> Path:
        file = write_experiment(tmp_path / "x.toml", tmp_path / "shards")
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")
        return file

    return make


def check(result: Result, message: str, runs: Path) -> None:
    assert result.code == 2, result
    assert message in result.err
    assert "Traceback" not in result.err
    assert not runs.exists()


@pytest.mark.parametrize("name", EDITS)
def test_mistakes_in_the_file(mistake: Callable[[str, str], Path], tmp_path: Path, name: str) -> None:
    old, new, message = EDITS[name]
    check(call("run", mistake(old, new), "--runs-dir", tmp_path / "runs"), message, tmp_path / "runs")


@pytest.mark.parametrize("command", ["show", "plan"])
def test_show_and_plan_say_the_same(mistake: Callable[[str, str], Path], tmp_path: Path, command: str) -> None:
    old, new, message = EDITS["accumulation"]
    check(call(command, mistake(old, new)), message, tmp_path / "runs")


def test_every_mistake_at_once(mistake: Callable[[str, str], Path], tmp_path: Path) -> None:
    file = mistake("depth = 1", "dept = 1\nhead_dims = 3\nsoftcap = true")
    result = call("run", file, "--set", "train.seed=x", "--set", "lodgers.console.progress=true")
    assert result.code == 2
    assert len(result.err.splitlines()) == 5
    for key in ("model.dept:", "model.head_dims:", "model.softcap:", "train.seed:", "lodgers:"):
        assert key in result.err


def test_an_empty_data_directory(mistake: Callable[[str, str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = mistake("/shards", "/empty")
    check(call("run", file, "--runs-dir", tmp_path / "runs"), f"{file}:10: data.path: ", tmp_path / "runs")


def test_documents_without_any_text(mistake: Callable[[str, str], Path], tmp_path: Path) -> None:
    file = mistake("depth = 1", "depth = 1")
    for path in (tmp_path / "shards").iterdir():
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    check(call("run", file, "--runs-dir", tmp_path / "runs"), "data.path", tmp_path / "runs")


def test_a_missing_file(mistake: Callable[[str, str], Path], tmp_path: Path) -> None:
    mistake("depth", "depth")
    check(call("run", tmp_path / "y.toml", "--runs-dir", tmp_path / "runs"), "no file", tmp_path / "runs")
    assert "there is x.toml" in call("run", tmp_path / "unlike.toml").err


def test_an_unwritable_runs_directory(mistake: Callable[[str, str], Path], tmp_path: Path) -> None:
    file = mistake("depth", "depth")
    (tmp_path / "occupied").write_text("a file")
    result = call("run", file, "--runs-dir", tmp_path / "occupied" / "runs")
    check(result, "--runs-dir: can't write run directories under", tmp_path / "runs")
    assert "--runs-dir DIR" in result.err
    assert (tmp_path / "occupied").read_text() == "a file"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sett", "model.depth=3"], "--sett"),
        (["--nproc", "0"], "must be a whole number from 1 to"),
        (["--nproc", "two"], "--nproc"),
        (["--set", "model.depth"], "write key=value"),
        (["--set", "model.detph=3"], 'did you mean "depth"'),
        (["extra"], "extra"),
    ],
)
def test_mistakes_on_the_command_line(
    mistake: Callable[[str, str], Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = call("run", mistake("depth", "depth"), "--runs-dir", tmp_path / "runs", *arguments)
    check(result, words, tmp_path / "runs")


@pytest.mark.parametrize("arguments", [[], ["rnu", "x.toml"], ["run"], ["sample"]])
def test_commands_that_are_none(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.code == 2
    assert "usage: nanochat" in result.err


def test_a_real_process_says_it_without_a_traceback(mistake: Callable[[str, str], Path], tmp_path: Path) -> None:
    file = mistake("depth = 1", "dept = 1")
    result = spawn("run", "x.toml", cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err == 'x.toml:14: model.dept: unknown key of model plugin "gpt" (did you mean "depth"?)\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", file.name]


def test_a_real_process_that_fails_late_leaves_nothing(mistake: Callable[[str, str], Path], tmp_path: Path) -> None:
    mistake("/shards", "/empty")
    (tmp_path / "empty").mkdir()
    result = spawn("run", "x.toml", cwd=tmp_path)
    assert result.code == 2
    assert result.err.startswith("x.toml:10: data.path: ")
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------------ plugins


def install(monkeypatch: pytest.MonkeyPatch, site: tuple[Path, str]) -> None:
    monkeypatch.syspath_prepend(site[0])


def test_a_plugin_whose_library_is_missing(
    mistake: Callable[[str, str], Path], tmp_path: Path, broken: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, broken)
    monkeypatch.setenv("NANOCHAT_PLUGINS", "bytes,parquet,gpt,muon,bpb,samples,broken_requirement")
    file = mistake('plugin = "console"', 'plugin = "unequipped"')
    result = call("run", file, "--runs-dir", tmp_path / "runs")
    check(result, f"{file}:43: loggers.unequipped: its library is missing (surely_missing_module)", tmp_path / "runs")
    assert "pip install surely-missing-module" in result.err
    shown = call("show", file)
    assert shown.code == 0
    assert "pip install surely-missing-module" in shown.err


def test_two_plugins_with_one_name(
    mistake: Callable[[str, str], Path], tmp_path: Path, broken: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, broken)
    file = mistake("depth", "depth")
    result = call("run", file, "--runs-dir", tmp_path / "runs")
    check(result, f"{file}:13: model.plugin: model 'gpt' is claimed by nanochat", tmp_path / "runs")
    assert "nanochat-broken-name-clash 0.1.0 (plugin 'broken_name_clash')" in result.err
    assert "nanochat-core 0.1.0 (plugin 'gpt')" in result.err
    assert "NANOCHAT_PLUGINS" in result.err


@pytest.mark.parametrize(("name", "words"), [("raising", "the factory divides by zero"), ("nowhere", "bulid")])
def test_a_plugin_whose_factory_fails_is_named_with_the_reason(
    mistake: Callable[[str, str], Path], tmp_path: Path, broken: tuple[Path, str], monkeypatch: pytest.MonkeyPatch,
    name: str, words: str,
) -> None:  # fmt: skip
    install(monkeypatch, broken)
    file = mistake('"gpt"\ndepth = 1\naspect_ratio = 32\nhead_dim = 16', f'"{name}"')
    result = call("run", file, "--runs-dir", tmp_path / "runs")
    assert result.code == 2
    assert f"model '{name}' of nanochat-broken-factory 0.1.0" in result.err
    assert words in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "runs").exists()


def test_naming_something_of_a_plugin_that_failed_to_load_says_why(
    mistake: Callable[[str, str], Path], broken: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, broken)
    file = mistake('"gpt"\ndepth = 1\naspect_ratio = 32\nhead_dim = 16', '"unimportable"')
    result = call("run", file)
    assert result.code == 2
    assert 'no model plugin "unimportable" is installed' in result.err
    assert "plugin 'broken_import' of nanochat-broken-import failed to load" in result.err
    assert "surely_missing_module" in result.err
