"""Short messages between ranks while collectives fail or hang, in the store beside the process group.

Whoever reaches the port of the store can write to it, so its texts are read as those of strangers.
"""

from __future__ import annotations

import contextlib
import os
import re
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
        first = None
        if self._store is not None:
            with self._while_it_stands() as store:
                first = _failure(store.compare_set("failure", "", text))
                if first is None:  # not written by a rank
                    store.set("failure", text)
        return first or failure

    def failure(self, wait: float = 0.0) -> RankFailure | None:
        """The failure that was recorded first. ``wait``: seconds to wait for one."""
        end = time.monotonic() + wait
        while (first := _failure(self._read("failure"))) is None:
            if time.monotonic() >= end or self._store is None:
                return None
            time.sleep(0.05)
        return first

    def post(self, rank: int, text: str) -> None:
        """Post a rank's text in place of its earlier one; an empty text removes it."""
        if self._store is not None:
            with self._while_it_stands() as store:
                store.set(f"post/{rank}", text)

    def posted(self, rank: int) -> str:
        """The text that a rank, or somebody else who reaches the store, has posted; or an empty string."""
        return self._read(f"post/{rank}").decode(errors="replace")

    def _read(self, key: str) -> bytes:
        content = b""
        if self._store is not None:
            with self._while_it_stands() as store:
                content = store.get(key) if store.check([key]) else b""
        return content

    @contextlib.contextmanager
    def _while_it_stands(self) -> Iterator[dist.Store]:
        store = self._store
        assert store is not None
        try:
            yield store
        except RuntimeError:
            self._store = None


def _failure(content: bytes) -> RankFailure | None:
    """The failure that a text describes; None for any other text, which no rank has written."""
    found = re.fullmatch(rb"(\d{1,7}) (\d{1,3})", content)
    return None if found is None or int(found[2]) == 0 else RankFailure(int(found[1]), int(found[2]))
