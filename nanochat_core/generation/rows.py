"""The rows of sequences that are being generated: what each has read, in whatever kind of cache the model has.

Rows are numbered without gaps: when one is removed, others take its number. N rows that read something, B rows,
T positions, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from nanochat_core.interfaces.model import Cache, Model, RowCache

STEP = 128  # positions by which a row cache grows at least


class Rows(Protocol):
    """What the engine needs of rows."""

    keeps_prefixes: bool  # whether ``save`` works and long texts may be read in pieces

    def add(self, limit: int, saved: Any = None, length: int = 0) -> None:
        """Add a row of at most ``limit`` positions, with the first ``length`` positions of what ``save`` returned."""

    def remove(self, row: int, moves: Sequence[tuple[int, int]]) -> None:
        """Remove a row. Then each move gives the row of its first number the second, and the last number is free."""

    def read(self, first: int, texts: Sequence[Sequence[int]]) -> Tensor:
        """Let the rows from ``first`` on read a text each, of one token or more. Returns the states after them."""

    def save(self, row: int, length: int) -> Any:
        """Return a copy of the first positions of a row."""


def make_rows(model: Model, most: int) -> Rows:
    """Return rows in the best kind of cache that the model has, up to ``most`` of them."""
    cache = model.new_row_cache(1, STEP)
    return EqualRows(model) if cache is None else CachedRows(model, most, cache)


class CachedRows:
    """Rows of a ``RowCache``, which grows with their number and with the longest of them."""

    keeps_prefixes = True

    def __init__(self, model: Model, most: int, cache: RowCache) -> None:
        self._model, self._most, self._cache = model, most, cache
        self._device = device_of(model)
        self._used = 0

    def add(self, limit: int, saved: Any = None, length: int = 0) -> None:
        self._make_room(self._used + 1, max(length, 1))
        self._used += 1
        if saved is not None:
            self._cache.load(self._used - 1, saved, length)

    def remove(self, row: int, moves: Sequence[tuple[int, int]]) -> None:
        for source, target in moves:
            length = self._cache.lengths[source]
            self._cache.load(target, self._cache.save(source, length), length)
        self._used -= 1
        self._cache.clear(self._used)

    def read(self, first: int, texts: Sequence[Sequence[int]]) -> Tensor:
        stop, T = first + len(texts), max(map(len, texts))
        self._make_room(self._used, max(map(int.__add__, self._cache.lengths[first:stop], map(len, texts))))
        if T == 1:
            ids_BT = torch.tensor(texts, device=self._device)
            return self._model.hidden(ids_BT, self._cache.rows(first, stop))[:, 0]
        counts = [len(text) for text in texts]
        ids_BT = torch.tensor([[*text, *[0] * (T - len(text))] for text in texts], device=self._device)
        states_BTD = self._model.hidden(ids_BT, self._cache.rows(first, stop, counts))
        last_B = torch.tensor(counts, device=self._device) - 1
        return states_BTD[torch.arange(len(counts), device=self._device), last_B]

    def save(self, row: int, length: int) -> Any:
        return self._cache.save(row, length)

    def _make_room(self, rows: int, tokens: int) -> None:
        old = self._cache
        if rows <= len(old.lengths) and tokens <= old.max_tokens:
            return
        if rows > len(old.lengths):
            rows = min(self._most, max(rows, 2 * len(old.lengths)))
        else:
            rows = len(old.lengths)
        if tokens > old.max_tokens:
            tokens = math.ceil(max(tokens, 3 * old.max_tokens // 2) / STEP) * STEP
        else:
            tokens = old.max_tokens
        new = self._model.new_row_cache(rows, tokens)
        assert new is not None, "a model has row caches or it has not"
        for row, length in enumerate(old.lengths[: self._used]):
            if length:
                new.load(row, old.save(row, length), length)
        self._cache = new


@attrs.define(eq=False)
class _Group:
    """Rows of equal length that share a cache; some of them may have been removed."""

    cache: Cache
    room: int  # positions that the cache holds
    size: int
    alive: int


@attrs.define(eq=False)
class _Row:
    limit: int
    text: list[int]
    group: _Group | None = None
    place: int = 0  # in the batch of the group


class EqualRows:
    """Rows of a model without a ``RowCache``: those of equal length are computed together, with a cache if it has one.

    A group of rows that began together shares a cache. When half of them are gone the others are read again from the
    start, into a smaller one.
    """

    keeps_prefixes = False

    def __init__(self, model: Model) -> None:
        self._model, self._device = model, device_of(model)
        self._rows: list[_Row] = []

    def add(self, limit: int, saved: Any = None, length: int = 0) -> None:
        assert saved is None, "nothing can be saved"
        self._rows.append(_Row(limit, []))

    def remove(self, row: int, moves: Sequence[tuple[int, int]]) -> None:
        group = self._rows[row].group
        for source, target in moves:
            self._rows[target] = self._rows[source]
        self._rows.pop()
        if group is None:
            return
        group.alive -= 1
        if 2 * group.alive <= group.size:
            for other in self._rows:
                if other.group is group:
                    other.group = None

    def read(self, first: int, texts: Sequence[Sequence[int]]) -> Tensor:
        rows = self._rows[first : first + len(texts)]
        together: dict[Any, list[int]] = {}
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            row.text += text
            if row.group is not None and len(row.text) > row.group.room:
                row.group = None
            together.setdefault(row.group or len(row.text), []).append(index)
        states: list[Tensor | None] = [None] * len(rows)
        for key, indices in together.items():
            chosen = [rows[index] for index in indices]
            found_BD = self._continue(key, chosen) if isinstance(key, _Group) else self._begin(chosen)
            for index, state_D in zip(indices, found_BD, strict=True):
                states[index] = state_D
        return torch.stack([state_D for state_D in states if state_D is not None])

    def _continue(self, group: _Group, rows: list[_Row]) -> Tensor:
        ids_B1 = torch.zeros(group.size, 1, dtype=torch.int64)
        for row in rows:
            ids_B1[row.place, 0] = row.text[-1]
        return self._model.hidden(ids_B1.to(self._device), group.cache)[[row.place for row in rows], 0]

    def _begin(self, rows: list[_Row]) -> Tensor:
        # Twice the length, not the limit, which may be much more than what is ever needed.
        room = min(max(row.limit for row in rows), 2 * len(rows[0].text) + 2 * STEP)
        cache = self._model.new_cache(len(rows), room)
        group = None if cache is None else _Group(cache, room, len(rows), len(rows))
        for place, row in enumerate(rows):
            row.group, row.place = group, place
        return self._model.hidden(torch.tensor([row.text for row in rows], device=self._device), cache)[:, -1]

    def save(self, row: int, length: int) -> Any:
        raise NotImplementedError


def device_of(model: Model) -> torch.device:
    """The device of a model's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
