"""Errors that know which option they are about."""

from __future__ import annotations

import pickle

import pytest

from nanochat_core import ConfigError, DataError, NanochatError, PluginError, Problem


def test_a_key_is_completed_once_by_whoever_is_nearest() -> None:
    error = DataError("no such file", key="path")
    assert str(error) == "path: no such file"
    error.in_table("data")
    error.in_table("tokenizer")  # the tokenizer was reading the documents
    assert str(error) == "data.path: no such file"
    error.add_places({"data.path": "x.toml:3", "tokenizer.path": "x.toml:1"})
    error.add_places({"data.path": "elsewhere.toml:9"})
    assert str(error) == "x.toml:3: data.path: no such file"


def test_an_error_without_a_key_stays_as_it_is() -> None:
    for error in (PluginError("data.path: in the text"), DataError("plain"), NanochatError()):
        before = str(error)
        error.in_table("data")
        error.add_places({"data.path": "x.toml:3", "": "x.toml:1"})
        assert str(error) == before


def test_whole_keys_stay() -> None:
    error = ConfigError([Problem("evaluators.mine.sets", "odd"), Problem("tokens", "few"), Problem("", "in all")])
    error.in_table("evaluators.mine")
    assert [problem.key for problem in error.problems] == ["evaluators.mine.sets", "evaluators.mine.tokens", ""]
    error.add_places({"evaluators.mine.tokens": "x.toml:3"})
    assert str(error) == "evaluators.mine.sets: odd\nx.toml:3: evaluators.mine.tokens: few\nin all"


@pytest.mark.parametrize("error", [DataError("few", key="path"), ConfigError([Problem("a.b", "c", "d")])])
def test_an_error_survives_the_way_to_another_process(error: NanochatError) -> None:
    error.in_table("data")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == (str(error), error.problems)
    again.in_table("model")
    assert str(again) == str(error)


def test_an_error_of_a_plugin_with_a_constructor_of_its_own() -> None:
    class Odd(DataError):
        def __init__(self, code: int) -> None:
            self.code = code

    error = Odd(7)
    error.in_table("data")
    error.add_places({"data.path": "x.toml:3"})
    assert str(error) == "7"
