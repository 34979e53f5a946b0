"""What ranks tell each other beside the process group."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from nanochat_core.distributed.store import RankFailure, RankStore


def test_the_first_failure_that_is_marked_stays() -> None:
    store = HashStore()
    first, second = RankStore(store), RankStore(store)
    assert first.failure() is None
    assert first.mark_failure(RankFailure(3, 2)) == RankFailure(3, 2)
    assert second.mark_failure(RankFailure(1, 1)) == RankFailure(3, 2)
    assert second.failure() == RankFailure(3, 2)


def test_failure_waits_no_longer_than_it_is_told() -> None:
    store, started = RankStore(HashStore()), time.monotonic()
    assert store.failure(wait=0.1) is None
    assert time.monotonic() - started >= 0.1


def test_a_text_is_posted_replaced_and_taken_down() -> None:
    store = HashStore()
    ours, theirs = RankStore(store), RankStore(store)
    assert theirs.posted(1) == ""
    for text in ("waits", "goes on", ""):
        ours.post(1, text)
        assert theirs.posted(1) == text
    assert theirs.posted(0) == ""


def test_what_was_written_before_a_restart_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    RankStore(store).mark_failure(RankFailure(0, 1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert RankStore(store).failure() is None


@pytest.mark.parametrize(
    "text", ["", " ", "x", "1", "1 0", "-1 2", "1 2 3", "1 2\n", "9" * 5000 + " 1", "\x1b[2J", "²3 1"]
)
def test_what_no_rank_writes_hides_no_failure(text: str) -> None:
    store = HashStore()
    ours, theirs = RankStore(store), RankStore(store)
    PrefixStore("nanochat/0", store).set("failure", text)
    assert theirs.failure() is None
    assert ours.mark_failure(RankFailure(3, 2)) == RankFailure(3, 2)
    assert theirs.failure() == RankFailure(3, 2)


def test_one_rank_alone_needs_no_store() -> None:
    store = RankStore.open(1)
    store.post(0, "text")
    assert store.posted(0) == ""
    assert store.mark_failure(RankFailure(0, 4)) == RankFailure(0, 4)
    assert store.failure() is None


def test_a_store_that_has_died_is_silent() -> None:
    store = RankStore(HashStore())
    store._store = _dead()
    store.post(0, "text")
    assert store.posted(0) == ""
    assert store.mark_failure(RankFailure(2, 1)) == RankFailure(2, 1)
    assert store.failure(wait=60) is None  # at once


def _dead() -> PrefixStore:
    """A connection to a server that is gone."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
    del server
    return PrefixStore("x", client)
