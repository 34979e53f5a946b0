"""Packing by best fit: what fits, what is cropped, and what a cursor resumes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core import CheckpointError, DataError
from nanochat_core.data.best_fit import BestFitLane, best_fit
from nanochat_core.data.packing import Cursor, join


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


@settings(max_examples=100)
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


@settings(max_examples=100)
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
    with pytest.raises(CheckpointError, match="differs from the one that the run was started with"):
        BestFitLane(Numbered([9] * 9), 8, cursor=cursor, window=4).next_rows(1)
