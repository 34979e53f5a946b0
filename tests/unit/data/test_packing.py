"""Stream packing against the obvious way: everything in one long list."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.fakes import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core import CheckpointError, DataError
from nanochat_core.data.best_fit import BestFitLane, best_fit
from nanochat_core.data.packing import Cursor, Encoder, StreamLane, join, lanes
from nanochat_core.data.validation import validation_rows
from nanochat_core.interfaces.loss import IGNORED

TOKENIZER = FakeTokenizer()


def encoder(documents: list[str]) -> Encoder:
    return Encoder(documents, TOKENIZER)


texts = st.lists(st.text(max_size=12), min_size=1, max_size=40)


def tokens_of(documents: list[str]) -> list[int]:
    return [token for text in documents for token in [TOKENIZER.bos_id, *TOKENIZER.encode(text)]]


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=100, deadline=None)
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
    with pytest.raises(CheckpointError, match="isn't the one the run was started with"):
        StreamLane(encoder(["one", "two", "three"]), 4, cursor=cursor).next_rows(1)


def test_more_lanes_than_documents() -> None:
    with pytest.raises(DataError, match="1 training documents"):
        StreamLane(encoder(["one"]), 4, 1, 2)


# ------------------------------------------------------------------------------------------------------- best fit


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different: document number times 1000, plus position. Position 0 is bos."""
    return [np.arange(length, dtype=np.int32) + 1000 * i for i, length in enumerate(lengths)]


class Numbered:
    """A token source of such documents."""

    def __init__(self, lengths: list[int]) -> None:
        self.documents = numbered(lengths)
        self.reads: list[range] = []

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, indices: range) -> list[np.ndarray]:
        self.reads.append(indices)
        return [self.documents[i] for i in indices]


many_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def test_best_fit_places_the_largest_that_fits() -> None:
    rows, lost = best_fit(numbered([3, 6, 2, 9, 5]), 10)
    # 9, then only a crop fits: 1 of the shortest (2). 6, 3, then 1 of the shortest left (5).
    assert rows.tokens.tolist() == [[*range(3000, 3009), 2000], [*range(1000, 1006), 0, 1, 2, 4000]]
    assert rows.cropped.tolist() == [1, 4]
    assert rows.dropped.tolist() == [0, 0]
    assert lost == 0


def test_best_fit_drops_an_unfinished_row() -> None:
    rows, lost = best_fit(numbered([4, 4, 3]), 8)
    assert rows.tokens.tolist() == [[*range(1000, 1004), *range(4)]]
    assert (rows.dropped.tolist(), lost) == ([3], 0)
    rows, lost = best_fit(numbered([4, 3]), 8)
    assert (rows.tokens.shape, lost) == ((0, 8), 7)


@given(many_lengths, st.integers(1, 20))
def test_best_fit_loses_only_what_it_counts(lengths: list[int], capacity: int) -> None:
    rows, lost = best_fit(numbered(lengths), capacity)
    seen = rows.tokens.flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert len(seen) + rows.cropped.sum() + rows.dropped.sum() + lost == sum(lengths)
    for row in rows.tokens.tolist():
        assert row[0] % 1000 == 0, "a row starts with a document"
        for before, token in pairwise(row):
            assert token == before + 1 or (token % 1000 == 0 and before % 1000 == lengths[before // 1000] - 1)
    for row, cropped in zip(rows.tokens.tolist(), rows.cropped.tolist(), strict=True):
        assert cropped == lengths[row[-1] // 1000] - 1 - row[-1] % 1000, "only the last document of a row is cropped"


@settings(max_examples=100, deadline=None)
@given(many_lengths, st.integers(1, 15), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_an_epoch_of_best_fit(lengths: list[int], T: int, window: int, S: int, count: int) -> None:
    S = min(S, len(lengths))
    for lane in range(S):
        mine = Numbered(lengths)
        packed = BestFitLane(mine, T, lane, S, epochs=1, window=window)
        parts = []
        while packed.has(1):
            parts.append(packed.next_rows(1))
        with pytest.raises(DataError, match=r"data\.epochs"):
            packed.next_rows(1)
        own = lengths[lane::S]
        tokens = join(parts).tokens.flatten().tolist() if parts else []
        assert len(set(tokens)) == len(tokens)
        assert {token // 1000 for token in tokens} <= set(range(lane, len(lengths), S))
        losses = sum(int(part.cropped.sum() + part.dropped.sum()) for part in parts)
        assert len(tokens) + losses <= sum(own)
        windows = [own[i * window :] if i == max(len(own) // window, 1) - 1 else own[i * window : (i + 1) * window]
                   for i in range(max(len(own) // window, 1))]  # fmt: skip
        expected = [len(best_fit(numbered(w), T + 1)[0].tokens) for w in windows]
        assert len(parts) == sum(expected)
        if expected[-1]:  # nothing was lost after the last row, so everything is counted
            assert len(tokens) + losses == sum(own)


@settings(max_examples=100, deadline=None)
@given(many_lengths, st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(1, 15), st.integers(1, 9))
def test_any_cursor_of_best_fit_resumes(lengths: list[int], counts: list[int], T: int, window: int) -> None:
    lengths = [*lengths, T + 1]  # some window fills a row
    whole = BestFitLane(Numbered(lengths), T, window=window)
    assert whole.cursor == (0, 0, 0)
    for count in counts:
        source = Numbered(lengths)
        resumed = BestFitLane(source, T, cursor=whole.cursor, window=window)
        at = whole.cursor.document
        rows = whole.next_rows(count)
        for mine, theirs in zip(resumed.next_rows(count), rows, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert resumed.cursor == whole.cursor
        assert source.reads[0].start == at, "a resume reads from its window on"


def test_best_fit_tokenizes_the_next_window_bit_by_bit() -> None:
    source = Numbered([16] * 64)
    lane = BestFitLane(source, 15, window=16)
    lane.next_rows(1)
    assert sum(map(len, source.reads)) == 16 + 1
    for _ in range(7):
        lane.next_rows(1)
    assert sum(map(len, source.reads)) == 16 + 8


def test_documents_too_short_for_any_row() -> None:
    with pytest.raises(DataError, match=r"no 4 documents together fill a row of 33 tokens.*data\.packing_window"):
        BestFitLane(Numbered([3] * 20), 32, window=4).next_rows(1)


@pytest.mark.parametrize("cursor", [Cursor(0, 9, 0), Cursor(0, 2, 0), Cursor(0, 4, 99), Cursor(0, -4, 0)])
def test_cursor_of_best_fit_that_points_nowhere(cursor: Cursor) -> None:
    with pytest.raises(CheckpointError, match="isn't the one the run was started with"):
        BestFitLane(Numbered([9] * 9), 8, cursor=cursor, window=4).next_rows(1)


def test_stream_stops_after_its_epochs() -> None:
    lane = StreamLane(encoder(["abc"] * 4), 3, epochs=2)  # 2 x 16 tokens
    assert lane.has(10)
    assert not lane.has(11)
    lane.next_rows(10)
    assert not lane.has(1)
    with pytest.raises(DataError, match="read 2 times"):
        lane.next_rows(1)


# ----------------------------------------------------------------------------------------------------- validation


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
