"""Stream packing against the obvious way: everything in one long list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_bytes.config import BytesConfig
from nanochat_bytes.tokenizer import build
from nanochat_core import CheckpointError, DataError, TokenizerContext
from nanochat_core.interfaces import IGNORED
from nanochat_core.packing import Cursor, StreamLane, lanes, validation_rows

TOKENIZER = build(BytesConfig(), TokenizerContext(documents=list))

texts = st.lists(st.text(max_size=12), min_size=1, max_size=40)


def tokens_of(documents: list[str]) -> list[int]:
    return [token for text in documents for token in [TOKENIZER.bos_id, *TOKENIZER.encode(text)]]


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 12))
def test_no_token_is_lost_or_repeated(documents: list[str], count: int, T: int, S: int, calls: int) -> None:
    S = min(S, len(documents))
    for lane in range(S):
        stream = StreamLane(documents, TOKENIZER, lane, S)
        rows = np.concatenate([stream.next_rows(count, T) for _ in range(calls)])
        epoch = tokens_of(documents[lane::S])
        expected = (epoch * (len(rows) * T // len(epoch) + 2))[: len(rows) * T + 1]
        assert rows[:, :-1].flatten().tolist() == expected[:-1]
        assert rows[:, 1:].flatten().tolist() == expected[1:]


@settings(max_examples=100, deadline=None)
@given(texts, st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 9))
def test_any_cursor_resumes(documents: list[str], counts: list[int], T: int) -> None:
    whole = StreamLane(documents, TOKENIZER)
    assert whole.cursor == (0, 0, 0)
    for count in counts:
        resumed = StreamLane(documents, TOKENIZER, cursor=whole.cursor)
        rows = whole.next_rows(count, T)
        np.testing.assert_array_equal(resumed.next_rows(count, T), rows)
        assert resumed.cursor == whole.cursor
        assert rows.dtype == np.int32


@given(texts, st.integers(1, 60))
def test_cursor_counts_the_tokens_before_it(documents: list[str], tokens: int) -> None:
    stream = StreamLane(documents, TOKENIZER)
    stream.next_rows(1, tokens)
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
    rows = StreamLane(documents, TOKENIZER, cursor=Cursor(5, 300, 4)).next_rows(1, 20)
    assert TOKENIZER.decode(rows[0].tolist()) == "ument 300<|bos|>document 30"


def test_lanes_deal_documents_out() -> None:
    documents = [str(i) for i in range(10)]
    rows = StreamLane(documents, TOKENIZER, 1, 4).next_rows(1, 8)
    assert TOKENIZER.decode(rows[0].tolist()).split("<|bos|>") == ["", "1", "5", "9", "1", ""]


@pytest.mark.parametrize(
    ("rows", "documents", "expected"),
    [(64, 10**6, 64), (1024, 10**6, 64), (24, 10**6, 8), (7, 10**6, 1), (64, 512, 64), (64, 511, 32), (64, 3, 1)],
)
def test_lanes(rows: int, documents: int, expected: int) -> None:
    assert lanes(rows, documents) == expected


@pytest.mark.parametrize("cursor", [Cursor(0, 3, 0), Cursor(0, -1, 0), Cursor(0, 1, 4)])
def test_cursor_that_points_nowhere(cursor: Cursor) -> None:
    with pytest.raises(CheckpointError, match="isn't the one the run was started with"):
        StreamLane(["one", "two", "three"], TOKENIZER, cursor=cursor).next_rows(1, 4)


def test_more_lanes_than_documents() -> None:
    with pytest.raises(DataError, match="1 training documents"):
        StreamLane(["one"], TOKENIZER, 1, 2)


@given(st.lists(st.text(max_size=12), max_size=40), st.integers(0, 300), st.integers(1, 9))
def test_validation_rows(documents: list[str], tokens: int, T: int) -> None:
    flat = tokens_of(documents)
    if len(flat) < 2:
        with pytest.raises(DataError, match="to predict"):
            validation_rows(documents, TOKENIZER, tokens, T)
        return
    ids, targets = validation_rows(documents, TOKENIZER, tokens, T)
    wanted = max(tokens // T, 1)
    real = min(wanted * T, len(flat) - 1)
    assert ids.shape == targets.shape == (-(-real // T), T)
    assert ids.dtype == targets.dtype == np.int32
    filled = ids.size - real
    assert 0 <= filled < T
    assert ids.flatten().tolist() == flat[:real] + [0] * filled
    assert targets.flatten().tolist() == flat[1 : real + 1] + [IGNORED] * filled
