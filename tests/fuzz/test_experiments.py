"""Experiments and overrides of any content are accepted, or refused with a message."""

from __future__ import annotations

import copy
import datetime
import itertools
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import tomli_w
from helpers.fuzzing import assert_message, inputs, snapshot, time_limit, well_behaved
from helpers.support import Result, write_experiment
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat_core import ConfigError, NanochatError
from nanochat_core.config.load import LoadedExperiment, Tables, load
from nanochat_core.config.parse import parse_toml
from nanochat_core.config.schema import CORE_TABLES
from nanochat_core.config.tables import dump
from nanochat_core.hardware.machine import pick_device
from nanochat_core.planning.planner import make_plan
from nanochat_core.plugins.choice import PLUGIN_LISTS, PLUGIN_TABLES, RESERVED, EntryKeys
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.plugins.structure import fields_of

pytestmark = pytest.mark.fuzz

PLUGINS = load_plugins()
# Those that a plan may build without the network, and names that nothing has.
PLANNED = {
    "tokenizer": ["bytes", "bpe", "sentencepiece", "tiktoken", "huggingface", "nobodys", "", "\0", "\x1b[2J"],
    "data": ["parquet", "text", "jsonl", "python_docs", "nobodys", "", "\0"],
    "model": ["gpt", "gtp", "x" * 5000],
    "optimizer": ["muon_adamw", "adamw", ""],
    "evaluators": ["bpb", "samples", "core", "nobodys", "", "a.b", "\0"],
    "loggers": ["console", "csv", "tensorboard", "wandb", "nobodys"],
}


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


# What somebody might write, by mistake or not, where an option has another type, a bound or a format.
NUMBERS = [
    0, 1, -1, 2, 3, 7, 64, 256, 1000, 2**14, 2**16, 10**6, 2**24, 10**9, 2**31, 2**40, 10**12, 2**53, 2**53 + 1, 2**62,
    2**63 - 1, 2**63, -(2**63) - 1, 10**18, 10**30,
]  # fmt: skip
FLOATS = [
    0.0,
    -0.0,
    0.5,
    1.0,
    math.nextafter(1, 0),
    -1e-9,
    1e-300,
    5e-324,
    1e6,
    1e30,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
]
TEXTS = [
    "", " ", "auto", "x", "x" * 300, "x" * 5000, "\0", "a\nb", "\x1b[2J", "\u2028", "\u202e", "é", "🙂", "../..", "-rf",
    ".", "~nobody_here/x", "/dev/null", "/proc/self/mem", "a" * 300 + "/b", "a/" * 3000, "*", "[", "**/*.txt", "%s",
    "{0}", "nan", "1e5", "true", "2024", "=", '"', "'", "s3://key:secret@bucket/x", "http://", "://", "a.b", "(", "\\",
]  # fmt: skip
OTHERS = [
    True,
    False,
    [],
    [[]],
    {},
    {"a": 1},
    [1, "a"],
    ["a", "a"],
    ["\0"],
    [{}],
    nested(40),
    datetime.date(2024, 1, 1),
]
VALUES: list[Any] = [*NUMBERS, 10**401, -(10**4000), *FLOATS, *TEXTS, *OTHERS]


def options(planned_only: bool) -> dict[str, list[str]]:
    """Dotted keys of all options, by table and plugin."""
    found = {table: [*fields_of(config)] for table, config in CORE_TABLES.items()}
    for table, kind in {**PLUGIN_TABLES, **PLUGIN_LISTS}.items():
        keys = [*fields_of(RESERVED.get(kind, EntryKeys))]
        for entry in PLUGINS[kind]:
            if not planned_only or entry.name in PLANNED[table]:
                found[f"{table}/{entry.name}"] = [*keys, *fields_of(entry.config)]
    return found


def base(shards: Path) -> dict[str, Any]:
    """A tiny experiment as plain data."""
    return {
        "run": {"name": "tiny", "tags": ["a", "b"]},
        "tokenizer": {"plugin": "bytes"},
        "data": {"plugin": "parquet", "path": str(shards)},
        "model": {"plugin": "gpt", "depth": 1, "aspect_ratio": 32, "head_dim": 16},
        "optimizer": {"plugin": "muon_adamw"},
        "schedule": {"warmup_steps": 1},
        "train": {"max_seq_len": 32, "device_batch_size": 4, "total_batch_size": 256, "num_iterations": 12,
                  "dtype": "float32", "compile": False},
        "checkpoint": {"save_every": 4},
        "evaluators": [{"plugin": "bpb", "every": 4, "eval_tokens": 512}],
        "loggers": [{"plugin": "console"}],
    }  # fmt: skip


KEYS = options(planned_only=True)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[dict[str, Any]], None]:
    """A change of an experiment, as plain data."""
    table = draw(st.sampled_from([*CORE_TABLES, *PLANNED]))
    how = draw(st.sampled_from(["set", "set", "set", "set", "plugin", "delete", "rename", "replace", "twice", "top"]))
    value, name = draw(st.sampled_from(VALUES)), draw(st.sampled_from([*TEXTS, "plugin", "depth", "remove", "every"]))
    pick = draw(st.integers(0, 10**6))

    def change(content: dict[str, Any]) -> None:
        part = content.get(table)
        part = part[pick % len(part)] if isinstance(part, list) and part else part
        if how == "top" or not isinstance(part, dict):
            content[name] = value
        elif how == "set":
            keys = KEYS.get(table) or KEYS.get(f"{table}/{part.get('plugin')}") or ["x"]
            part[keys[pick % len(keys)]] = value
        elif how == "plugin" and table in PLANNED:
            part["plugin"] = PLANNED[table][pick % len(PLANNED[table])]
        elif how == "replace":
            content[table] = value
        elif how == "twice":
            content[table] = [part, copy.deepcopy(part)]
        elif part:
            key = [*part][pick % len(part)]
            moved = part.pop(key)
            if how == "rename":
                part[name] = moved

    return change


def mutants(most: int = 3) -> st.SearchStrategy[Callable[[dict[str, Any]], str]]:
    """Functions from an experiment to the text of a changed one."""

    def together(made: list[Callable[[dict[str, Any]], None]], edits: list[tuple[int, int, str]]) -> Any:
        def text_of(content: dict[str, Any]) -> str:
            for change in made:
                change(content)
            text = tomli_w.dumps(content)
            for at, length, new in edits:
                start = at % (len(text) + 1)
                text = text[:start] + new + text[start + length :]
            return text

        return text_of

    noise = st.sampled_from(
        ["[", "]", "[[", '"', "'", '"""', "=", "\n", "#", ".", "a.b.c = 1\n", "[a]\n", "\0", "\ufeff", "\r"]
    )
    edits = st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.one_of(noise, st.text(max_size=5)))
    return st.builds(
        together, st.lists(changes(), min_size=1, max_size=most), st.one_of(st.just([]), st.lists(edits, max_size=2))
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, without the network."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "a" / "b"


@given(mutant=mutants(), command=st.sampled_from(["show", "plan", "plan", "plan --device h100"]))
@inputs(50)
def test_mutated_files(
    shards: Path, here: Path, mutant: Callable[[dict[str, Any]], str], command: str, tried: Callable[[str], None]
) -> None:
    tried("experiment files")
    file = here / "x.toml"
    file.write_bytes(mutant(base(shards)).encode("utf-8", "surrogatepass"))
    before = snapshot(here)
    name, *more = command.split()
    well_behaved(name, file, *more)
    assert snapshot(here) == before


@given(raw=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
@example(raw=b"a" + b".a" * 5000 + b" = 1")
@example(raw=b"a = " + b"[" * 5000)
@example(raw=b"a = " + b"{a = " * 500)
@example(raw=b"[x]\n" * 2)
@example(raw=b"x = 0x" + b"f" * 10_000)
@example(raw=b"x = " + b"9" * 10_000)
@example(raw=b"x" * (2 << 20))
@inputs(80)
def test_files_of_any_bytes(here: Path, raw: bytes, tried: Callable[[str], None]) -> None:
    tried("experiment files")
    (here / "x.toml").write_bytes(raw)
    well_behaved("show", here / "x.toml", codes=(2,))


def literal(value: Any) -> str:
    """A value as somebody writes it behind ``--set key=``."""
    return str(value) if isinstance(value, str) else tomli_w.dumps({"v": value}).partition("=")[2].strip()


def overrides(keys: dict[str, list[str]], values: list[Any]) -> st.SearchStrategy[list[str]]:
    def one(plugin: str, pick: int, value: Any) -> list[str]:
        table, _, name = plugin.partition("/")
        prefix = f"{table}.{name}" if table in PLUGIN_LISTS else table
        key = keys[plugin][pick % len(keys[plugin])]
        chosen = [f"{prefix}.plugin={name}"] if name else []
        return [*chosen, f"{prefix}.{key}={literal(value)}"]

    single = st.builds(one, st.sampled_from([*keys]), st.integers(0, 10**6), st.sampled_from(values))
    return st.lists(single, min_size=1, max_size=2).map(lambda lists: [*itertools.chain(*lists)])


def settings_of(texts: list[str]) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


@given(texts=overrides(KEYS, VALUES), command=st.sampled_from(["show", "plan", "plan"]))
@inputs(50)
def test_overrides(shards: Path, here: Path, texts: list[str], command: str, tried: Callable[[str], None]) -> None:
    tried("overrides")
    file = write_experiment(here / "tiny.toml", shards)
    before = snapshot(here)
    well_behaved(command, file, *settings_of(texts))
    assert snapshot(here) == before


def trains_quickly(loaded: LoadedExperiment) -> bool:
    try:
        plan = make_plan(loaded, 1, pick_device(0)).plan
    except NanochatError:
        return False
    return plan.total_flops < 1e11 and sum(plan.memory.values()) < 2**30 and plan.num_iterations <= 3


def fitting(tp: Any) -> list[Any]:
    """Values of a type, few of them sensible, none of them large."""
    if get_origin(tp) in (Union, types.UnionType):
        return [value for part in get_args(tp) for value in fitting(part)]
    if get_origin(tp) is Literal:
        return [*get_args(tp)]
    few = {bool: [True, False], int: [0, 1, 2, 3, 7, 64], str: ["x", "auto", "é", "S", "2"], Path: ["x", "."]}
    floats = [0, 1e-30, 1e-9, 0.3, 0.5, math.nextafter(1, 0), 1, 7, 1e6]
    return few.get(tp, floats if tp is float else [["x", "y"], []] if get_origin(tp) is tuple else [])


def fields(plugin: str) -> dict[str, Any]:
    table, _, name = plugin.partition("/")
    if not name:
        return fields_of(CORE_TABLES[table])
    kind = {**PLUGIN_TABLES, **PLUGIN_LISTS}[table]
    return fields_of(RESERVED.get(kind, EntryKeys)) | fields_of(PLUGINS[kind].get(name).config)


# What a run of tiny has, so that an override changes one thing.
OF_TINY = [
    *CORE_TABLES, "data/parquet", "model/gpt", "optimizer/muon_adamw", "optimizer/adamw", "evaluators/bpb",
    "evaluators/samples", "tokenizer/bpe",
]  # fmt: skip


@st.composite
def sensible(draw: st.DrawFn) -> list[str]:
    texts = []
    for plugin in draw(st.lists(st.sampled_from(OF_TINY), min_size=1, max_size=2)):
        table, _, name = plugin.partition("/")
        prefix = f"{table}.{name}" if table in PLUGIN_LISTS else table
        key, field = draw(st.sampled_from([*fields(plugin).items()]))
        values = [] if key in ("plugin", "name", "path") else fitting(field.type)
        texts += [f"{prefix}.plugin={name}"] if name else []
        texts += [f"{prefix}.{key}={literal(draw(st.sampled_from(values)))}"] if values else []
    return texts


@given(texts=sensible())
@inputs(8)
def test_what_a_plan_accepts_a_run_can_do(
    shards: Path, here: Path, texts: list[str], tried: Callable[[str], None], tmp_path: Path
) -> None:
    file = write_experiment(here / "tiny.toml", shards)
    texts = ["train.num_iterations=2", "train.total_batch_size=128", *texts]
    try:
        loaded = load(file, texts, PLUGINS).require_all()
    except ConfigError:
        return
    if trains_quickly(loaded):
        tried("runs of overrides")
        well_behaved("run", file, "--runs-dir", tmp_path / "runs", *settings_of(texts), codes=(0, 2, 3))


def tables_of(shards: Path) -> dict[str, Any]:
    content = base(shards)
    for table in PLUGIN_LISTS:
        content[table] = {entry["plugin"]: entry for entry in content[table]}
    return content


ALL_KEYS = options(planned_only=False)


@given(
    plugin=st.sampled_from([*ALL_KEYS]),
    pick=st.integers(0, 10**6),
    value=st.one_of(
        st.sampled_from(VALUES),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.lists(st.sampled_from(VALUES), max_size=3),
    ),
    as_text=st.booleans(),
)
@inputs(600)
def test_values_of_every_option(
    shards: Path, here: Path, plugin: str, pick: int, value: Any, as_text: bool, tried: Callable[[str], None]
) -> None:
    """A value is refused with the option's key, or the experiment can be written down and read again."""
    tried("option values")
    content = tables_of(shards)
    table, _, name = plugin.partition("/")
    key = ALL_KEYS[plugin][pick % len(ALL_KEYS[plugin])]
    at = content[table].setdefault(name, {}) if table in PLUGIN_LISTS else content[table]
    if name and at.get("plugin") != name:
        at.clear()
        at["plugin"] = name
    texts = []
    if as_text:
        try:
            prefix = f"{table}.{name}" if table in PLUGIN_LISTS else table
            texts = [f"{prefix}.{key}={literal(value)}"]
        except UnicodeEncodeError:
            return
    else:
        at[key] = value
    with time_limit(20):
        try:
            loaded = load(None, texts, PLUGINS, [Tables(content, "here")])
        except ConfigError as error:
            assert_message(Result(2, "", str(error)))
            return
        if loaded.missing:
            return
        text = dump(loaded.experiment)
        text.encode()
        parse_toml(text)
        (here / "again.toml").write_text(text, encoding="utf-8")
        again = load(here / "again.toml", (), PLUGINS).experiment
        assert again == loaded.experiment or "://***@" in text or "=***" in text  # credentials are not written down
