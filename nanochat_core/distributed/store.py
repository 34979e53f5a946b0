"""Short messages between ranks while collectives fail or hang, in the store beside the process group."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import attrs
import torch.distributed as dist

TIMEOUT = timedelta(seconds=10)


@attrs.frozen
class RankFailure:
    """The first rank that failed, and its exit code."""

    rank: int
    code: int


class RankStore:
    """A connection to the store. After the process that holds the store has died, reads return nothing.

    Args:
        store: of the process group; None when there is only one rank.
    """

    def __init__(self, store: dist.Store | None) -> None:
        # What was written before a restart by torchrun is no longer valid.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = None if store is None else dist.PrefixStore(f"nanochat/{attempt}", store)

    @classmethod
    def open(cls, world_size: int) -> RankStore:
        """This rank's own connection to the store that the environment names. Call it after the process group is
        initialised."""
        if world_size == 1:
            return cls(None)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return cls(dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT, wait_for_workers=False))

    def mark_failure(self, failure: RankFailure) -> RankFailure:
        """Record that a rank failed. Returns the failure that was recorded first, which may be of another rank."""
        text = f"{failure.rank} {failure.code}"
        if self._store is not None:
            with self._while_it_stands() as store:
                text = store.compare_set("failure", "", text).decode()
        return _failure(text)

    def failure(self, wait: float = 0.0) -> RankFailure | None:
        """The failure that was recorded first. ``wait``: seconds to wait for one."""
        end = time.monotonic() + wait
        while not (text := self._read("failure")):
            if time.monotonic() >= end or self._store is None:
                return None
            time.sleep(0.05)
        return _failure(text)

    def post(self, rank: int, text: str) -> None:
        """Post a rank's text in place of its earlier one; an empty text removes it."""
        if self._store is not None:
            with self._while_it_stands() as store:
                store.set(f"post/{rank}", text)

    def posted(self, rank: int) -> str:
        """The text that a rank has posted, or an empty string."""
        return self._read(f"post/{rank}")

    def _read(self, key: str) -> str:
        text = ""
        if self._store is not None:
            with self._while_it_stands() as store:
                text = store.get(key).decode() if store.check([key]) else ""
        return text

    @contextlib.contextmanager
    def _while_it_stands(self) -> Iterator[dist.Store]:
        store = self._store
        assert store is not None
        try:
            yield store
        except RuntimeError:
            self._store = None


def _failure(text: str) -> RankFailure:
    rank, code = text.split()
    return RankFailure(int(rank), int(code))
