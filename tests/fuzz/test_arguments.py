"""Command lines, whatever they hold: an exit code of 0 or 2, and a message that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from helpers.fuzzing import assert_message, inputs, time_limit, well_behaved
from helpers.support import Result, Trained, call
from hypothesis import example, given
from hypothesis import strategies as st

pytestmark = pytest.mark.fuzz

NUMBERS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "-1", "nan", "inf", "-inf", "1e-320", "1e400", "9" * 20, "9" * 5000, "1_0", "²", "x"]
    ),
    st.integers(-3, 3).map(str),
    st.floats().map(str),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "caf\udce9", "\udcff\udcfe", "\x00", "\x1b[2J", "-x", "--", "--help", "~nobody/x", "a" * 5000]
    ),
    st.text(max_size=9),
)  # fmt: skip
OPTIONS = st.lists(
    st.tuples(st.sampled_from(["--max-tokens", "--temperature", "--top-k", "--seed"]), NUMBERS), max_size=2
)
WORDS = st.one_of(
    TEXTS, NUMBERS, st.sampled_from(["--set", "--runs-dir", "--to", "--nproc", "--evaluator", "--trust", "--compare"])
)


@given(text=TEXTS, options=OPTIONS)
@example(text="x", options=[("--temperature", "nan")])
@example(text="x", options=[("--temperature", "1e-320")])
@example(text="x", options=[("--seed", "9" * 20)])
@example(text="x", options=[("--max-tokens", "1000000000000")])
@inputs(80)
def test_prompts_and_options_of_sample(
    trained: Trained, text: str, options: list[tuple[str, str]], tried: Callable[[str], None]
) -> None:
    tried("options of sample")
    words = [f"{name}={value}" for name, value in options]
    end = [] if any("max-tokens" in word for word in words) else ["--max-tokens=2"]
    with time_limit():
        result = call("sample", "tiny", *words, *end, "--runs-dir", trained.runs, "--", text)
    assert result.code in (0, 2)
    assert_message(Result(result.code, "", result.err))  # stdout has the text and what the model says, whatever it is


@given(command=st.sampled_from(["sample", "eval", "log-sync", "runs", "show", "plan", "data info", "tokenizer show"]),
       words=st.lists(WORDS, max_size=4))  # fmt: skip
@inputs(150)
def test_words_in_any_order(
    empty_directory: None, command: str, words: list[str], tried: Callable[[str], None]
) -> None:
    tried("command lines")
    well_behaved(*command.split(), *words)


@pytest.fixture(scope="module")
def empty_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield
