"""Text as it comes: never half a character, nothing of a stop string, in the end the same as decoding all tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_bytes.tokenizer import ByteTokenizer
from nanochat_core.generation.text import TextStream

BYTES = ByteTokenizer()


def run(data: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    stream = TextStream(BYTES, stop)
    pieces = []
    for byte in data:
        text, stopped_by = stream.add(byte)
        pieces.append(text)
        if stopped_by is not None:
            return pieces, stopped_by
    return [*pieces, stream.finish()], None


@given(st.binary(max_size=40))
def test_all_of_it_is_what_decoding_at_once_gives(data: bytes) -> None:
    assert "".join(run(data)[0]) == data.decode("utf-8", errors="replace")


@given(st.text(max_size=20))
def test_characters_come_whole(text: str) -> None:
    data = text.encode("utf-8", errors="replace")
    pieces, _ = run(data)
    seen = ""
    for end, piece in enumerate(pieces[:-1], 1):
        seen += piece
        assert seen == data[:end].decode("utf-8", errors="ignore")  # no more, no less
    assert pieces[-1] == ""


def test_a_real_replacement_character_is_kept() -> None:
    assert "".join(run("a\ufffdb\ufffd".encode())[0]) == "a\ufffdb\ufffd"
    assert "".join(run("é".encode()[:1])[0]) == "\ufffd"  # half a character at the end


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_a_stop_string_cuts_the_text_before_it(text: str, stops: list[str]) -> None:
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    pieces, stopped_by = run(text.encode(), tuple(stops))
    if not ends:
        assert ("".join(pieces), stopped_by) == (text, None)
        return
    end, minus, stop = min(ends)  # the first that is complete, the longest of those
    assert ("".join(pieces), stopped_by) == (text[: end + minus], stop)


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=5))
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: str) -> None:
    stream, seen = TextStream(BYTES, (stop,)), ""
    for end, byte in enumerate(text.encode(), 1):
        piece, stopped_by = stream.add(byte)
        if stopped_by is not None:
            return
        seen += piece
        held = next(n for n in range(len(stop) - 1, -1, -1) if text[:end].endswith(stop[:n]))
        assert seen == text[: end - held]


def test_time_is_linear_in_the_length() -> None:
    """The number of characters that are looked at, not seconds."""

    class Counted(str):
        looked = 0

        def __eq__(self, other: object) -> bool:
            Counted.looked += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    stream = TextStream(BYTES, ("a" * 50 + "b",))
    matcher = stream._stops[0]
    for _ in range(5000):
        assert not matcher.add(Counted("a"))
    assert Counted.looked <= 4 * 5000


@pytest.mark.parametrize("stop", ["né", "日本"])
def test_stop_strings_that_span_bytes_of_characters(stop: str) -> None:
    pieces, stopped_by = run(f"ab{stop}cd".encode(), (stop,))
    assert ("".join(pieces), stopped_by) == ("ab", stop)
