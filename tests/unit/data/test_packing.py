"""Stream packing against the obvious way: everything in one long list."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fakes import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core import CheckpointError, DataError
from nanochat_core.data.packing import Cursor, Encoder, StreamLane, join, lanes

TOKENIZER = FakeTokenizer()


def encoder(documents: list[str]) -> Encoder:
    return Encoder(documents, TOKENIZER)


texts = st.lists(st.text(max_size=12), min_size=1, max_size=40)


def tokens_of(documents: list[str]) -> list[int]:
    return [token for text in documents for token in [TOKENIZER.bos_id, *TOKENIZER.encode(text)]]


@settings(max_examples=100)
@given(texts, st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 12))
def test_no_token_is_lost_or_repeated(documents: list[str], count: int, T: int, S: int, calls: int) -> None:
    S = min(S, len(documents))
    for lane in range(S):
        stream = StreamLane(encoder(documents), T, lane, S)
        made = join([stream.next_rows(count) for _ in range(calls)])
        rows = made.tokens
        epoch = tokens_of(documents[lane::S])
        expected = (epoch * (len(rows) * T // len(epoch) + 2))[: len(rows) * T + 1]
        assert rows[:, :-1].flatten().tolist() == expected[:-1]
        assert rows[:, 1:].flatten().tolist() == expected[1:]
        assert made.cropped.tolist() == made.dropped.tolist() == [0] * len(rows)


@settings(max_examples=100)
@given(texts, st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 9))
def test_any_cursor_resumes(documents: list[str], counts: list[int], T: int) -> None:
    whole = StreamLane(encoder(documents), T)
    assert whole.cursor == (0, 0, 0)
    for count in counts:
        resumed = StreamLane(encoder(documents), T, cursor=whole.cursor)
        rows = whole.next_rows(count).tokens
        np.testing.assert_array_equal(resumed.next_rows(count).tokens, rows)
        assert resumed.cursor == whole.cursor
        assert rows.dtype == np.int32


@given(texts, st.integers(1, 60))
def test_cursor_counts_the_tokens_before_it(documents: list[str], tokens: int) -> None:
    stream = StreamLane(encoder(documents), tokens)
    stream.next_rows(1)
    epoch, document, offset = stream.cursor
    before = epoch * len(tokens_of(documents)) + len(tokens_of(documents[:document])) + offset
    assert before == tokens
    assert offset < len(tokens_of([documents[document]]))
    assert stream.epoch == epoch + document / len(documents)


def test_a_cursor_needs_no_earlier_document() -> None:
    class Forgetful(list[str]):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            assert not isinstance(index, slice) or index.start >= 300
            return super().__getitem__(index)

    documents = Forgetful(f"document {i}" for i in range(400))
    rows = StreamLane(encoder(documents), 20, cursor=Cursor(5, 300, 4)).next_rows(1)
    assert TOKENIZER.decode(rows.tokens[0].tolist()) == "ument 300<|bos|>document 30"


def test_lanes_deal_documents_out() -> None:
    documents = [str(i) for i in range(10)]
    rows = StreamLane(encoder(documents), 8, 1, 4).next_rows(1)
    assert TOKENIZER.decode(rows.tokens[0].tolist()).split("<|bos|>") == ["", "1", "5", "9", "1", ""]


@pytest.mark.parametrize(
    ("rows", "documents", "expected"),
    [(64, 10**6, 64), (1024, 10**6, 64), (24, 10**6, 8), (7, 10**6, 1), (64, 512, 64), (64, 511, 32), (64, 3, 1)],
)
def test_lanes(rows: int, documents: int, expected: int) -> None:
    assert lanes(rows, documents) == expected


@pytest.mark.parametrize(
    ("documents", "window", "expected"), [(10**6, 64, 64), (64 * 256, 64, 64), (64 * 256 - 1, 64, 32), (64, 1, 16)]
)
def test_lanes_of_best_fit_hold_several_windows(documents: int, window: int, expected: int) -> None:
    assert lanes(64, documents, "best_fit", window) == expected


@pytest.mark.parametrize("cursor", [Cursor(0, 3, 0), Cursor(0, -1, 0), Cursor(0, 1, 4)])
def test_cursor_that_points_nowhere(cursor: Cursor) -> None:
    with pytest.raises(CheckpointError, match="differs from the one that the run was started with"):
        StreamLane(encoder(["one", "two", "three"]), 4, cursor=cursor).next_rows(1)


def test_more_lanes_than_documents() -> None:
    with pytest.raises(DataError, match="1 training documents"):
        StreamLane(encoder(["one"]), 4, 1, 2)


def test_stream_stops_after_its_epochs() -> None:
    lane = StreamLane(encoder(["abc"] * 4), 3, epochs=2)  # 2 x 16 tokens
    assert lane.has(10)
    assert not lane.has(11)
    lane.next_rows(10)
    assert not lane.has(1)
    with pytest.raises(DataError, match="read 2 times"):
        lane.next_rows(1)
