"""Causal attention, and the cache of keys and values that makes sampling cheap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_gpt.config import Shape


class LayerCache:
    """One layer's keys and values."""

    def __init__(self, k_BKTC: Tensor, v_BKTC: Tensor, start: int) -> None:
        self.k_BKTC, self.v_BKTC, self.start = k_BKTC, v_BKTC, start

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk; return all keys and values so far."""
        stop = self.start + k_BKTC.shape[2]
        self.k_BKTC[:, :, self.start : stop] = k_BKTC
        self.v_BKTC[:, :, self.start : stop] = v_BKTC
        return self.k_BKTC[:, :, :stop], self.v_BKTC[:, :, :stop]


class KVCache:
    """Keys and values of a batch of sequences that grow together; ``length`` positions are filled."""

    def __init__(
        self, layers: int, batch_size: int, shape: Shape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (layers, 2, batch_size, shape.kv_heads, max_tokens, shape.head_dim)
        self._kv = torch.empty(size, dtype=dtype, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self._kv[index, 0], self._kv[index, 1], self.length)


def attend(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, cache: LayerCache | None = None) -> Tensor:
    """Softmax attention of each position over itself and those before it: [B, H, T, C]."""
    start = 0
    if cache is not None:
        start = cache.start
        k_BKTC, v_BKTC = cache.extend(k_BKTC, v_BKTC)
    T, S = q_BHTC.shape[2], k_BKTC.shape[2]
    mask_TS = None
    if start and T > 1:
        mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTC.device).tril(diagonal=start)
    return F.scaled_dot_product_attention(
        q_BHTC,
        k_BKTC,
        v_BKTC,
        attn_mask=mask_TS,
        is_causal=start == 0 and T > 1,
        enable_gqa=q_BHTC.shape[1] != k_BKTC.shape[1],
    )
