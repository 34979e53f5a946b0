"""Names that others gave never become paths that lead elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fuzzing import inputs
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat_core.files import path_in, shorten

pytestmark = pytest.mark.fuzz

PARTS = st.one_of(
    st.sampled_from(
        [".", "..", "", "/", "~", "-rf", "a", "a.parquet", "C:", "\\\\host", "a\x00b", "a\n", "\x1b[2J", " a "]
    ),
    st.text(max_size=300),
    st.text(st.characters(categories=["Cs", "Cc", "Cf"]), max_size=3),
)


@given(name=st.one_of(st.lists(PARTS, max_size=5).map("/".join), PARTS, st.binary(), st.none(), st.integers()))
@example(name="../../../../etc/passwd")
@inputs(500)
def test_a_name_stays_in_its_directory(name: object, tried: Callable[[str], None]) -> None:
    tried("names")
    for nested in (False, True):
        directory = Path("/some/where")
        try:
            path = path_in(directory, name, nested=nested)
        except ValueError as error:
            message = str(error)
        else:
            message = ""
            assert path.is_relative_to(directory)
            assert path != directory
            assert ".." not in path.parts
            assert nested or path.parent == directory
            assert str(path).isprintable()
            str(path).encode()
        assert not message or message.isprintable()
        assert len(message) < 300


@given(value=st.recursive(st.one_of(st.text(), st.binary(), st.integers(), st.floats()), st.lists))
@example(value=10**5000)
@inputs(300)
def test_a_shortened_value_is_one_short_printable_line(value: object, tried: Callable[[str], None]) -> None:
    tried("values in messages")
    text = shorten(value)
    assert text.isprintable()
    assert len(text) <= 80
