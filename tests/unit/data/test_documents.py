"""Long sequences of documents, and what can't be read of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core import DataError
from nanochat_core.data import documents
from nanochat_core.data.documents import Documents, UnreadablePlaces, hold_out


class Numbers(Documents):
    """Document i is str(i)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Iterable[int]) -> Iterator[str]:
        for i in indices:
            assert 0 <= i < self.count
            yield str(i)


maybe = st.none() | st.integers(-30, 30)


@given(st.integers(0, 20), maybe, maybe, st.sampled_from([None, 1, 2, 7, -1, -3]))
def test_documents_slice_like_a_list(count: int, start: int | None, stop: int | None, step: int | None) -> None:
    expected = [str(i) for i in range(count)]
    assert Numbers(count)[start:stop:step] == expected[start:stop:step]
    assert list(Numbers(count)) == expected


@given(st.integers(0, 20), st.integers(-30, 30))
def test_documents_index_like_a_list(count: int, index: int) -> None:
    expected = [str(i) for i in range(count)]
    if -count <= index < count:
        assert Numbers(count)[index] == expected[index]
    else:
        with pytest.raises(IndexError, match=f"of {count}"):
            Numbers(count)[index]


@given(st.integers(0, 200), st.floats(0.01, 0.5))
def test_hold_out_deals_every_document_to_one_side(count: int, fraction: float) -> None:
    train, val = hold_out(Numbers(count), fraction)
    assert sorted([*train, *val], key=int) == [str(i) for i in range(count)]
    assert len(train) == len(list(train))
    assert len(val) == len(list(val)) == count // round(1 / fraction)
    assert list(train) == sorted(train, key=int)
    assert [val[i] for i in range(len(val))] == list(val)


def test_an_unreadable_place_fails_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"on_error: a\.txt is torn; get it again, or set data\.on_error to skip"):
        UnreadablePlaces().report("a.txt is\n torn", "get it again")


def test_unreadable_places_that_are_skipped_are_listed_once() -> None:
    places = UnreadablePlaces("skip")
    for name in ("b", "a", "b"):
        places.report(f"{name} is torn", "get it again")
    assert places.lines() == ["skipped: b is torn", "skipped: a is torn"]


def test_too_many_unreadable_places_fail_although_they_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_SKIPPED", 3)
    places = UnreadablePlaces("skip")
    for i in range(3):
        places.report(str(i), "")
    with pytest.raises(DataError, match="more than 3 places can't be read, the last: 3"):
        places.report("3", "")
