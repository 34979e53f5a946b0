"""Strict types: what a plugin's config class accepts from TOML, and which classes are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import attrs
import pytest

from nanochat_core import ConfigError, PluginError, above, at_least, between, one_of, option
from nanochat_core.config.load import load
from nanochat_core.config.tables import dump
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.plugins.registry import KINDS, Registrar
from nanochat_core.plugins.structure import check_config_class


@attrs.frozen
class Inner:
    size: int = option(1, "a size", validator=at_least(1))
    names: tuple[str, ...] = option((), "names")


@attrs.frozen
class Everything:
    flag: bool = option(False, "a switch")
    count: int = option(1, "a number", validator=at_least(0))
    rate: float = option(0.1, "a rate", validator=above(0))
    word: str = option("x", "a word")
    where: Path = option(Path("/nowhere"), "a path")
    mode: Literal["fast", "slow", 3] = option("fast", "how")
    maybe: int | None = option(None, "perhaps a number")
    either: int | Literal["auto"] = option("auto", "a number or auto", validator=at_least(1))
    switch: bool | Literal["auto"] = option("auto", "a switch or auto")
    sizes: tuple[int, ...] = option((1, 2), "numbers")
    chosen: int = option(2, "one of two", validator=one_of(2, 4))
    part: float = option(0.5, "a share", validator=between(0, 1))
    inner: Inner = option(Inner(), "a table")

    def __attrs_post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("count and superstition don't go together: take 12 or 14")


@attrs.frozen
class Empty:
    pass


def plugins() -> Plugins:
    made = Plugins()
    for kind in KINDS:
        registrar = Registrar(made[kind], "here", "tests", "1.0")
        registrar.add("plain", config=Everything if kind == "model" else Empty, factory="nowhere:build")
    return made


def structure(tmp_path: Path, options: str) -> Everything:
    tables = "".join(f'[{t}]\nplugin = "plain"\n' for t in ("tokenizer", "data", "optimizer"))
    file = tmp_path / "x.toml"
    file.write_text(f'{tables}[model]\nplugin = "plain"\n{options}\n', encoding="utf-8")
    loaded = load(file, (), plugins())
    file.write_text(dump(loaded.experiment), encoding="utf-8")
    assert load(file, (), plugins()).experiment == loaded.experiment  # there and back
    config: Everything = loaded.experiment.model.config
    return config


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ("flag = true", "flag", True),
        ("count = 0", "count", 0),
        ("rate = 2", "rate", 2.0),
        ("rate = 1e-3", "rate", 1e-3),
        ('word = "false"', "word", "false"),
        ('where = "/a/b"', "where", Path("/a/b")),
        ('mode = "slow"', "mode", "slow"),
        ("mode = 3", "mode", 3),
        ("maybe = 5", "maybe", 5),
        ("either = 7", "either", 7),
        ('either = "auto"', "either", "auto"),
        ("switch = false", "switch", False),
        ("sizes = []", "sizes", ()),
        ("sizes = [3]", "sizes", (3,)),
        ("chosen = 4", "chosen", 4),
        ("part = 1", "part", 1.0),
        ("inner = {size = 3}", "inner", Inner(size=3)),
        ('inner.names = ["a"]', "inner", Inner(names=("a",))),
    ],
)
def test_what_fits(tmp_path: Path, written: str, name: str, value: Any) -> None:
    found = getattr(structure(tmp_path, written), name)
    assert found == value
    assert type(found) is type(value)


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/my/home")
    assert structure(tmp_path, 'where = "data"').where == tmp_path / "data"
    assert structure(tmp_path, 'where = "~/data"').where == Path("/my/home/data")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('flag = "false"', 'flag: must be bool, not "false"'),
        ("flag = 1", "flag: must be bool, not 1"),
        ("count = 12.7", "count: must be int, not 12.7"),
        ("count = 12.0", "count: must be int, not 12.0"),
        ('count = "12"', 'count: must be int, not "12"'),
        ("count = true", "count: must be int, not true"),
        ("count = -1", "count: must be at least 0, not -1"),
        ('rate = "0.1"', 'rate: must be float, not "0.1"'),
        ("rate = true", "rate: must be float, not true"),
        ("rate = 0", "rate: must be greater than 0, not 0"),
        ("rate = nan", "rate: must be greater than 0, not nan"),
        ("word = 3", "word: must be str, not 3"),
        ("where = 3", "where: must be path, not 3"),
        ('mode = "fats"', 'mode: must be "fast" or "slow" or 3, not "fats"'),
        ("mode = 3.0", 'mode: must be "fast" or "slow" or 3, not 3.0'),
        ('maybe = "none"', 'maybe: must be int, not "none"'),
        ('either = "aut"', 'either: must be int or "auto", not "aut"'),
        ("either = 0", "either: must be at least 1, not 0"),
        ("either = true", 'either: must be int or "auto", not'),
        ("switch = 1", 'switch: must be bool or "auto", not 1'),
        ("sizes = 3", "sizes: must be a list of int, not 3"),
        ('sizes = [1, "2"]', 'sizes: must be int, not "2"'),
        ("chosen = 3", "chosen: must be one of 2, 4, not 3"),
        ("part = 1.5", "part: must lie between 0 and 1, not 1.5"),
        ("inner = 3", "inner: must be a table, not 3"),
        ("inner.size = 0", "inner.size: must be at least 1, not 0"),
        ("inner.sizes = 0", 'inner.sizes: unknown key of model plugin "plain" (did you mean "size"?)'),
        ("count = {x = 1}", "count: must be int, not"),
        ("count = 13", "model: count and superstition don't go together"),
    ],
)
def test_what_does_not(tmp_path: Path, written: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(tmp_path, written)
    (problem,) = caught.value.problems
    line = str(problem).removeprefix(f"{tmp_path}/x.toml:")
    assert line.removeprefix("9: ").removeprefix("8: ").removeprefix("model.").startswith(message)
    assert line[0] in "89"


def test_all_of_them_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(tmp_path, "flag = 1\ncount = 1.5\nchosen = 3\ninner.size = 0\ninner.names = 3\noops = 1")
    assert [p.key for p in caught.value.problems] == [
        "model.oops",
        "model.flag",
        "model.count",
        "model.chosen",
        "model.inner.size",
        "model.inner.names",
    ]


def test_an_option_without_default_is_required(tmp_path: Path) -> None:
    @attrs.frozen
    class Needy:
        size: int = option(help="must be given")

    made = plugins()
    Registrar(made["logger"], "here", "tests", "1.0").add("needy", config=Needy, factory="nowhere:build")
    file = tmp_path / "x.toml"
    tables = "".join(f'[{t}]\nplugin = "plain"\n' for t in ("tokenizer", "data", "optimizer", "model"))
    file.write_text(f'{tables}\n[[loggers]]\nplugin = "needy"\n')
    with pytest.raises(ConfigError, match=r"x\.toml:11: loggers\.needy\.size: missing: give a value \(int\)"):
        load(file, (), made)


def test_mutable_defaults_are_refused() -> None:
    with pytest.raises(TypeError, match="tuple"):
        option([], "a list")


class NotAttrs:
    size: int = 3


@attrs.frozen
class Unfillable:
    when: complex = option(1j, "TOML has no such numbers")


@attrs.frozen
class WithTable:
    options: dict[str, int] = option(help="any keys")


@attrs.frozen
class Unresolved:
    size: Missing = option(1, "its type is not there at run time")  # type: ignore[name-defined]  # noqa: F821


@attrs.frozen
class Reserved:
    every: int = option(1, "the core's word on evaluators")


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("model", NotAttrs, r"must be an attrs class"),
        ("model", Unfillable, r"can't fill field 'when' of type .*complex"),
        ("model", WithTable, r"can't fill field 'options'"),
        ("model", Unresolved, r"field type that can't be resolved .*TYPE_CHECKING"),
        ("evaluator", Reserved, r"may not have a field 'every'"),
    ],
)
def test_config_classes_that_toml_cannot_fill(kind: str, config: type, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        check_config_class(kind, "x", config)


def test_config_classes_that_it_can() -> None:
    check_config_class("model", "x", Everything)
    check_config_class("model", "x", Reserved)  # only evaluators have an "every"
