"""Causal attention, and the cache of keys and values that makes sampling cheap.

Heads come first in all shapes: H query heads (K key and value heads), B sequences, T positions, C size of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat_gpt.config import Shape


class LayerCache:
    """One layer's keys and values."""

    def __init__(self, k_KBTC: Tensor, v_KBTC: Tensor, start: int) -> None:
        self.k_KBTC, self.v_KBTC, self.start = k_KBTC, v_KBTC, start

    def extend(self, k_KBTC: Tensor, v_KBTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk; return all keys and values so far."""
        stop = self.start + k_KBTC.shape[2]
        self.k_KBTC[:, :, self.start : stop] = k_KBTC
        self.v_KBTC[:, :, self.start : stop] = v_KBTC
        return self.k_KBTC[:, :, :stop], self.v_KBTC[:, :, :stop]


class KVCache:
    """Keys and values of a batch of sequences that grow together; ``length`` positions are filled."""

    def __init__(
        self, layers: int, batch_size: int, shape: Shape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (layers, 2, shape.kv_heads, batch_size, max_tokens, shape.head_dim)
        self._kv = torch.empty(size, dtype=dtype, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    def reserve(self, tokens: int) -> None:
        """Make sure that ``tokens`` more fit.

        Raises:
            IndexError: when they don't.
        """
        if self.length + tokens > self.max_tokens:
            raise IndexError(f"the cache holds {self.max_tokens} positions; {self.length + tokens} were asked for")

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self._kv[index, 0], self._kv[index, 1], self.length)


def attend(q_HBTC: Tensor, k_KBTC: Tensor, v_KBTC: Tensor, cache: LayerCache | None = None) -> Tensor:
    """Softmax attention of each position over itself and those before it: [H, B, T, C]."""
    if cache is None and _whole_matrix_is_faster(q_HBTC):
        groups = len(q_HBTC) // len(k_KBTC)
        if groups > 1:
            k_KBTC, v_KBTC = k_KBTC.repeat_interleave(groups, 0), v_KBTC.repeat_interleave(groups, 0)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (q_HBTC, k_KBTC, v_KBTC))
        y: Tensor = _WholeMatrixAttention.apply(*flat)
        return y.view_as(q_HBTC)
    if q_HBTC.is_meta:
        return _planned(q_HBTC, k_KBTC, v_KBTC)
    start, mask_TS = 0, None
    if cache is not None:
        start = cache.start
        k_KBTC, v_KBTC = cache.extend(k_KBTC, v_KBTC)
    T, S = q_HBTC.shape[2], k_KBTC.shape[2]
    if start and T > 1:
        mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_HBTC.device).tril(diagonal=start)
    return F.scaled_dot_product_attention(
        q_HBTC.transpose(0, 1),
        k_KBTC.transpose(0, 1),
        v_KBTC.transpose(0, 1),
        attn_mask=mask_TS,
        is_causal=start == 0 and T > 1,
        enable_gqa=len(q_HBTC) != len(k_KBTC),
    ).transpose(0, 1)


def _planned(q_HBTC: Tensor, k_KBTC: Tensor, v_KBTC: Tensor) -> Tensor:
    """Attention that only counts: it saves what flash attention saves. The meta device itself would choose the backend
    that keeps every T x T matrix."""
    groups = len(q_HBTC) // len(k_KBTC)
    q, k, v = (x.transpose(0, 1) for x in (q_HBTC, k_KBTC.repeat(groups, 1, 1, 1), v_KBTC.repeat(groups, 1, 1, 1)))
    y: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
    return y.transpose(0, 1)


def _whole_matrix_is_faster(q_HBTC: Tensor) -> bool:
    """Forward and backward on a CPU, 8,192 tokens of 2 heads of 128: flash 11 ms against 4 at T = 256 in bfloat16,
    31 against 17 at T = 512, 36 against 35 at T = 1024."""
    longest = 256 if q_HBTC.dtype.itemsize > 2 else 512
    return q_HBTC.is_cpu and q_HBTC.shape[2] <= longest and torch.is_grad_enabled()


class _WholeMatrixAttention(torch.autograd.Function):
    """Softmax of all T x T scores of a head at once; they are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q_GTC: Tensor, k_GTC: Tensor, v_GTC: Tensor) -> Tensor:
        G, T, C = q_GTC.shape
        future_TT = q_GTC.new_full((T, T), -math.inf).triu_(1)
        s_GTT = torch.baddbmm(future_TT.expand(G, T, T), q_GTC, k_GTC.mT, alpha=C**-0.5)
        p_GTT = torch.softmax(s_GTT, dim=-1)
        ctx.save_for_backward(q_GTC, k_GTC, v_GTC, p_GTT)
        return torch.bmm(p_GTT, v_GTC)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_GTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_GTC, k_GTC, v_GTC, p_GTT = ctx.saved_tensors
        dp_GTT = torch.bmm(dy_GTC, v_GTC.mT)
        ds_GTT = torch.ops.aten._softmax_backward_data(dp_GTT, p_GTT, -1, p_GTT.dtype)
        scale = q_GTC.shape[-1] ** -0.5
        dq_GTC = torch.bmm(ds_GTT, k_GTC).mul_(scale)
        dk_GTC = torch.bmm(ds_GTT.mT, q_GTC).mul_(scale)
        return dq_GTC, dk_GTC, torch.bmm(p_GTT.mT, dy_GTC)
