"""The key-value cache of a GPT.

Shapes: K key and value heads, B sequences, T positions, C the size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat_gpt.config import Shape


class LayerCache:
    """Keys and values of one layer, [K, B, max tokens, C]; the first ``start`` positions are filled."""

    def __init__(self, k_KBTC: Tensor, v_KBTC: Tensor, start: int) -> None:
        self.k_KBTC, self.v_KBTC, self.start = k_KBTC, v_KBTC, start

    def extend(self, k_KBTC: Tensor, v_KBTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the next positions. Returns all keys and values so far."""
        stop = self.start + k_KBTC.shape[2]
        self.k_KBTC[:, :, self.start : stop] = k_KBTC
        self.v_KBTC[:, :, self.start : stop] = v_KBTC
        return self.k_KBTC[:, :, :stop], self.v_KBTC[:, :, :stop]


class KVCache:
    """Keys, values and tokens (smear uses the previous one) of a batch of sequences of equal length.

    ``length`` positions are filled; lower it to discard the last ones.
    """

    def __init__(
        self, layers: int, batch_size: int, shape: Shape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (layers, 2, shape.kv_heads, batch_size, max_tokens, shape.head_dim)
        self._kv = torch.empty(size, dtype=dtype, device=device)
        self._ids_BT = torch.empty(batch_size, max_tokens, dtype=torch.int64, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    def append(self, ids_BT: Tensor) -> Tensor | None:
        """Store the next tokens, int64 [B, T]. Call this before ``length`` is increased.

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
        return LayerCache(self._kv[index, 0], self._kv[index, 1], self.length)
