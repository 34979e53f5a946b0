"""What a GPT keeps of the tokens it has read, which makes sampling cheap. Shapes as in ``attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat_gpt.config import Shape


class LayerCache:
    """One layer's keys and values; positions up to ``start`` are filled."""

    def __init__(self, k_KBTC: Tensor, v_KBTC: Tensor, start: int) -> None:
        self.k_KBTC, self.v_KBTC, self.start = k_KBTC, v_KBTC, start

    def extend(self, k_KBTC: Tensor, v_KBTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk; return all keys and values so far."""
        stop = self.start + k_KBTC.shape[2]
        self.k_KBTC[:, :, self.start : stop] = k_KBTC
        self.v_KBTC[:, :, self.start : stop] = v_KBTC
        return self.k_KBTC[:, :, :stop], self.v_KBTC[:, :, :stop]


class KVCache:
    """Keys and values of a batch of sequences that grow together, and their tokens (smear looks one back).
    ``length`` positions are filled; set it lower to forget the last ones."""

    def __init__(
        self, layers: int, batch_size: int, shape: Shape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (layers, 2, shape.kv_heads, batch_size, max_tokens, shape.head_dim)
        self._kv = torch.empty(size, dtype=dtype, device=device)
        self._ids_BT = torch.empty(batch_size, max_tokens, dtype=torch.int64, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    def append(self, ids_BT: Tensor) -> Tensor | None:
        """Take in the next tokens, and make room for their keys and values. Call before ``length`` grows.

        Returns:
            [B, 1] the token before them; None when they are the first.

        Raises:
            IndexError: when they don't fit.
        """
        stop = self.length + ids_BT.shape[1]
        if stop > self.max_tokens:
            raise IndexError(f"the cache holds {self.max_tokens} positions; {stop} were asked for")
        self._ids_BT[:, self.length : stop] = ids_BT
        return self._ids_BT[:, self.length - 1 : self.length] if self.length else None

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self._kv[index, 0], self._kv[index, 1], self.length)
