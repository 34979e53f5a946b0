"""Beginnings of texts whose computed states are kept, so that another text with the same beginning need not read it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

WORTH_LOADING = 16  # tokens; reading fewer takes no longer than copying them


class PrefixStore:
    """States of texts, up to a number of tokens in all; those used longest ago go first.

    Args:
        max_tokens: bound on the tokens of all texts that nobody has pinned.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._pins: dict[tuple[int, ...], int] = {}
        self.tokens = 0

    def put(self, text: Sequence[int], saved: Any, pins: int = 0) -> None:
        """Keep the states of a text. It is kept at least until ``unpin`` was called ``pins`` times."""
        key = tuple(text)
        if key not in self._entries:
            self.tokens += len(key)
        self._entries[key] = saved
        self._entries.move_to_end(key)
        if pins:
            self._pins[key] = self._pins.get(key, 0) + pins
        self._shrink()

    def unpin(self, text: Sequence[int]) -> None:
        """Take back one of the pins of a text."""
        key = tuple(text)
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._shrink()

    def find(self, text: Sequence[int]) -> tuple[Any, int]:
        """Return saved states and how many of their first tokens begin the text, at most all but its last token; or
        (None, 0)."""
        wanted, best, length = tuple(text[:-1]), None, 0
        for key in self._entries:
            common = _common(key, wanted)
            if common > length:
                best, length = key, common
        if best is None or length < min(WORTH_LOADING, len(wanted)):
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best], length

    def _shrink(self) -> None:
        for key in list(self._entries):
            if self.tokens <= self.max_tokens:
                return
            if key not in self._pins:
                del self._entries[key]
                self.tokens -= len(key)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
