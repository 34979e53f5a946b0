"""Key-value caches of a GPT: of sequences of one length, and of sequences of any lengths.

Shapes: K key and value heads, S = 2 K (keys, then values), B sequences, T positions, C the size of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_gpt.config import Shape


class Past(NamedTuple):
    """Numbers of positions that sequences have in a cache.

    Args:
        shortest, longest: the smallest and the largest of them.
        starts_B: each of them, int64; None if all are equal.
        room: number of positions that have keys, at most; padding may lie beyond.
    """

    shortest: int = 0
    longest: int = 0
    starts_B: Tensor | None = None
    room: int = sys.maxsize

    def keys(self, T: int) -> int:
        """Number of positions that have keys when T more are added."""
        return min(self.longest + T, self.room)


class LayerCache:
    """Keys and values of one layer, [S, B, max tokens, C]: those after ``past`` are to be filled."""

    def __init__(self, kv_SBTC: Tensor, past: Past, places: tuple[Tensor, Tensor] | None = None) -> None:
        self.kv_SBTC, self.past, self.places = kv_SBTC, past, places

    def extend(self, k_KBTC: Tensor, v_KBTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the next positions. Returns all keys and values so far."""
        K, _, T, _ = k_KBTC.shape
        stop = self.past.keys(T)
        if self.places is None:
            self.kv_SBTC[:K, :, stop - T : stop] = k_KBTC
            self.kv_SBTC[K:, :, stop - T : stop] = v_KBTC
        else:
            self.kv_SBTC[:, *self.places] = torch.cat([k_KBTC, v_KBTC])
        return self.kv_SBTC[:K, :, :stop], self.kv_SBTC[K:, :, :stop]


class KVCache:
    """Keys, values and tokens (smear uses the previous one) of a batch of sequences of equal length.

    ``length`` positions are filled; lower it to discard the last ones.
    """

    def __init__(
        self, layers: int, batch_size: int, shape: Shape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (layers, 2 * shape.kv_heads, batch_size, max_tokens, shape.head_dim)
        self._kv = torch.empty(size, dtype=dtype, device=device)
        self._ids_BT = torch.empty(batch_size, max_tokens, dtype=torch.int64, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    @property
    def past(self) -> Past:
        return Past(self.length, self.length)

    def append(self, ids_BT: Tensor) -> Tensor | None:
        """Store the next tokens, int64 [B, T]. Call this before ``advance``.

        Returns:
            The token before them, [B, 1]; None when they are the first.

        Raises:
            IndexError: when they exceed ``max_tokens``.
        """
        stop = self.length + ids_BT.shape[1]
        if stop > self.max_tokens:
            raise IndexError(f"the cache holds {self.max_tokens} positions; {stop} were requested")
        self._ids_BT[:, self.length : stop] = ids_BT
        return self._ids_BT[:, self.length - 1 : self.length] if self.length else None

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self._kv[index], self.past)

    def advance(self, tokens: int) -> None:
        """Count the appended tokens as read."""
        self.length += tokens


class SavedRow(NamedTuple):
    """A copy of a row: its tokens, int64 [T], and its keys and values, [layers, S, T, C]."""

    ids_T: Tensor
    kv: Tensor


class GPTRowCache:
    """Keys, values and tokens of sequences of any lengths: the ``RowCache`` of the core.

    Every row has one position more than can be read. It takes what padding would write beyond the end of the row.
    """

    def __init__(
        self, layers: int, rows: int, shape: Shape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros, because what is not filled is multiplied by probabilities of zero.
        size = (layers, 2 * shape.kv_heads, rows, max_tokens + 1, shape.head_dim)
        self._kv = torch.zeros(size, dtype=dtype, device=device)
        self._ids = torch.zeros(rows, max_tokens + 1, dtype=torch.int64, device=device)
        self.max_tokens = max_tokens
        self.lengths = [0] * rows

    def rows(self, start: int, stop: int, counts: Sequence[int] | None = None) -> RowsView:
        return RowsView(self, start, stop, counts)

    def save(self, row: int, length: int) -> SavedRow:
        return SavedRow(self._ids[row, :length].clone(), self._kv[:, :, row, :length].clone())

    def load(self, row: int, saved: SavedRow, length: int) -> None:
        self.clear(row)
        self._ids[row, :length] = saved.ids_T[:length]
        self._kv[:, :, row, :length] = saved.kv[:, :, :length]
        self.lengths[row] = length

    def clear(self, row: int) -> None:
        # All of it: a row that was not finite would reach the next one through probabilities of zero.
        self._kv[:, :, row].zero_()
        self.lengths[row] = 0


class RowsView:
    """Rows ``start`` to ``stop`` of a cache, for one forward pass in which row b reads ``counts[b]`` tokens."""

    def __init__(self, cache: GPTRowCache, start: int, stop: int, counts: Sequence[int] | None) -> None:
        self._cache, self._start, self._stop, self._counts = cache, start, stop, counts
        self._places: tuple[Tensor, Tensor] | None = None
        lengths = cache.lengths[start:stop]
        self.past = Past(min(lengths), max(lengths), room=cache.max_tokens + 1)
        if self.past.shortest < self.past.longest:
            starts_B = torch.tensor(lengths, device=cache._ids.device)
            self.past = self.past._replace(starts_B=starts_B)

    @property
    def length(self) -> int:
        """Number of positions of the longest row."""
        return self.past.longest

    def append(self, ids_BT: Tensor) -> Tensor | None:
        """Store the next tokens, int64 [B, T]. Call this before ``advance``.

        Returns:
            The token before them, [B, 1], -1 in a row where they are the first; None when they are the first in all.

        Raises:
            IndexError: when the tokens that count exceed ``max_tokens``.
        """
        cache, (_, longest, starts_B, _), T = self._cache, self.past, ids_BT.shape[1]
        counts = [T] * len(ids_BT) if self._counts is None else list(self._counts)
        stop = max(n + count for n, count in zip(cache.lengths[self._start : self._stop], counts, strict=True))
        if stop > cache.max_tokens:
            raise IndexError(f"a row of the cache holds {cache.max_tokens} positions; {stop} were requested")
        self._counts = counts
        ids = cache._ids[self._start : self._stop]
        if starts_B is None and longest + T <= cache.max_tokens:
            before_B1 = ids[:, longest - 1 : longest].clone() if longest else None
            ids[:, longest : longest + T] = ids_BT
            return before_B1
        if starts_B is None:
            starts_B = torch.full((len(ids),), longest, device=ids.device)
            self.past = self.past._replace(starts_B=starts_B)
        positions_BT = starts_B[:, None] + torch.arange(T, device=ids.device)
        self._places = (torch.arange(len(ids), device=ids.device)[:, None], positions_BT.clamp_max_(cache.max_tokens))
        before_B1 = torch.where(starts_B > 0, ids[self._places[0][:, 0], (starts_B - 1).clamp_min(0)], -1)[:, None]
        ids[self._places] = ids_BT
        return before_B1

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self._cache._kv[index, :, self._start : self._stop], self.past, self._places)

    def advance(self, tokens: int) -> None:
        """Count the appended tokens as read."""
        assert self._counts is not None, "append comes first"
        for row, count in enumerate(self._counts, self._start):
            self._cache.lengths[row] += count
