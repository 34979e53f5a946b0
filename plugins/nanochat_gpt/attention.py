"""Causal attention over all earlier tokens or over a window, by the fastest backend that is correct.

Heads come first in all shapes: H query heads (K key and value heads), B sequences, T positions, S keys, C the
size of a head.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat_core import cuda_capability, device_type
from nanochat_gpt.cache import LayerCache, Past

Backend = Literal["matrix", "sdpa", "flex", "flash3"]


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, length: int, window: int | None
) -> tuple[Backend, str]:
    """Choose the backend for attention over training rows. Returns it with the reason.

    Args:
        requested: value of the option; "auto" chooses the fastest backend that is correct.
        dtype: of queries, keys and values.
        length: tokens per row.
        window: number of earlier tokens that a token attends to; None: all.
    """
    if requested in ("matrix", "sdpa", "flex", "flash3"):
        return requested, "as requested"  # type: ignore[return-value]
    kind = device_type(device)
    if kind == "cuda":
        if not flash3_problem(device, dtype):
            return "flash3", "FlashAttention-3; unverified: it never ran on a GPU"
        if window is not None:
            return "flex", "FlexAttention skips blocks outside the window; unverified: it never ran on a GPU"
        return "sdpa", "cuDNN or FlashAttention-2 through torch"
    if kind == "cpu":
        # Forward and backward on 2 cores, 8,192 tokens of 2 heads of 128: flash 11 ms against 4 at T = 256 in
        # bfloat16, 31 against 17 at T = 512, 36 against 35 at T = 1024.
        longest = 256 if dtype.itemsize > 2 else 512
        if length <= longest:
            return "matrix", f"all T x T scores at once, fastest up to T = {longest} in {str(dtype)[6:]}"
    return "sdpa", "torch's scaled_dot_product_attention"


def flash3_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why FlashAttention-3 can't be used; empty when it can."""
    if cuda_capability(device)[0] != 9:
        return "it needs a Hopper GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, not in {str(dtype)[6:]}"
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "its package flash_attn_interface is not installed"
    return ""


class Masking(NamedTuple):
    """The attention mask of one layer in one forward pass.

    Args:
        backend: computes the attention.
        window: number of earlier tokens that a token attends to; None: all.
        first: position of the first key that any query attends to.
        mask: for matrix and sdpa a tensor [T, S] that is added to the scores, or [B, 1, T, S] (None: causal for T > 1,
            none for T = 1); for flex its block mask.
    """

    backend: Backend
    window: int | None
    first: int
    mask: Any


def make_masking(
    requested: str, window: int | None, T: int, past: Past, training: bool, dtype: torch.dtype, device: torch.device
) -> Masking:
    """Build the mask of T queries that follow the cached positions ``past``.

    Without ``training`` the backend is sdpa, or flash3 if it is chosen and no positions are cached.
    """
    if window is not None and past.longest + T - 1 <= window:
        window = None
    backend, _ = choose_backend(requested, device, dtype, T, window)
    if not training and (past.longest or backend != "flash3"):
        backend = "sdpa"  # for any shapes
    first = 0 if window is None else max(0, past.shortest - window)
    mask: Any = None
    if device.type == "meta" and backend != "matrix":
        pass  # only memory is counted, see _planned
    elif backend == "flex":
        mask = _block_mask(T, window, device)
    elif past.starts_B is not None:
        mask = _additive_mask(T, past.starts_B[:, None], first, past.keys(T), window, dtype)[:, None]
    elif backend == "matrix" or (backend == "sdpa" and T > 1 and (past.longest or window is not None)):
        start_1 = torch.tensor([past.longest], device=device)
        mask = _additive_mask(T, start_1, first, past.keys(T), window, dtype)
    return Masking(backend, window, first, mask)


def _additive_mask(T: int, starts: Tensor, first: int, stop: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """The mask [..., T, S] of T queries from positions ``starts`` [..., 1] on, over keys ``first`` to ``stop``."""
    queries_T1 = (starts + torch.arange(T, device=starts.device))[..., None]
    distance_TS = queries_T1 - torch.arange(first, stop, device=starts.device)
    hidden_TS = distance_TS < 0
    if window is not None:
        hidden_TS |= distance_TS > window
    return torch.zeros(hidden_TS.shape, dtype=dtype, device=starts.device).masked_fill_(hidden_TS, -math.inf)


@functools.lru_cache(maxsize=16)
def _block_mask(T: int, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) if window is None else (k <= q) & (q - k <= window)

    return create_block_mask(seen, None, None, T, T, device=str(device))


def attend(q_HBTC: Tensor, k_KBTC: Tensor, v_KBTC: Tensor, masking: Masking, cache: LayerCache | None = None) -> Tensor:
    """Softmax attention of each position over itself and the earlier positions in its window: [H, B, T, C]."""
    if cache is not None:
        k_KBTC, v_KBTC = (x[:, :, masking.first :] for x in cache.extend(k_KBTC, v_KBTC))
    if masking.backend == "matrix":
        return _whole_matrix(q_HBTC, k_KBTC, v_KBTC, masking.mask)
    if q_HBTC.is_meta:
        return _planned(q_HBTC, k_KBTC, v_KBTC)
    if masking.backend == "flash3":
        return _flash3(q_HBTC, k_KBTC, v_KBTC, masking.window)
    q_BHTC, k_BKTC, v_BKTC = (x.transpose(0, 1) for x in (q_HBTC, k_KBTC, v_KBTC))
    grouped = len(q_HBTC) != len(k_KBTC)
    if masking.backend == "flex":
        y_BHTC: Tensor = _flex()(q_BHTC, k_BKTC, v_BKTC, block_mask=masking.mask, enable_gqa=grouped)
    else:
        causal = masking.mask is None and q_HBTC.shape[2] > 1
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, attn_mask=masking.mask, is_causal=causal, enable_gqa=grouped
        )
    return y_BHTC.transpose(0, 1)


def _flash3(q_HBTC: Tensor, k_KBTC: Tensor, v_KBTC: Tensor, window: int | None) -> Tensor:
    from flash_attn_interface import flash_attn_func

    q_BTHC, k_BTKC, v_BTKC = (x.permute(1, 2, 0, 3) for x in (q_HBTC, k_KBTC, v_KBTC))
    reach = (-1, -1) if window is None else (window, 0)
    exact = torch.are_deterministic_algorithms_enabled()
    y = flash_attn_func(q_BTHC, k_BTKC, v_BTKC, causal=True, window_size=reach, deterministic=exact)
    y_BTHC: Tensor = y[0] if isinstance(y, tuple) else y  # older versions return the log-sum-exp too
    return y_BTHC.permute(2, 0, 1, 3)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled unless it is called in a compiled block: only then it is fast."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()  # type: ignore[return-value]


def _planned(q_HBTC: Tensor, k_KBTC: Tensor, v_KBTC: Tensor) -> Tensor:
    """Attention on the meta device, for counting memory: it saves the tensors that flash attention saves. The meta
    device itself would choose the backend that keeps every T x T matrix."""
    groups = len(q_HBTC) // len(k_KBTC)
    q, k, v = (x.transpose(0, 1) for x in (q_HBTC, k_KBTC.repeat(groups, 1, 1, 1), v_KBTC.repeat(groups, 1, 1, 1)))
    y: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
    return y.transpose(0, 1)


def _whole_matrix(q_HBTC: Tensor, k_KBTC: Tensor, v_KBTC: Tensor, mask_TT: Tensor) -> Tensor:
    groups = len(q_HBTC) // len(k_KBTC)
    if groups > 1:
        k_KBTC, v_KBTC = k_KBTC.repeat_interleave(groups, 0), v_KBTC.repeat_interleave(groups, 0)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q_HBTC, k_KBTC, v_KBTC))
    y_GTC: Tensor = _WholeMatrixAttention.apply(*flat, mask_TT)
    return y_GTC.view_as(q_HBTC)


class _WholeMatrixAttention(torch.autograd.Function):
    """Attention that computes all T x T scores of a head at once and keeps them for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q_GTC: Tensor, k_GTC: Tensor, v_GTC: Tensor, mask_TT: Tensor) -> Tensor:
        G, T, C = q_GTC.shape
        s_GTT = torch.baddbmm(mask_TT.expand(G, T, T), q_GTC, k_GTC.mT, alpha=C**-0.5)
        p_GTT = torch.softmax(s_GTT, dim=-1)
        ctx.save_for_backward(q_GTC, k_GTC, v_GTC, p_GTT)
        return torch.bmm(p_GTT, v_GTC)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_GTC: Tensor) -> tuple[Tensor | None, ...]:
        q_GTC, k_GTC, v_GTC, p_GTT = ctx.saved_tensors
        dp_GTT = torch.bmm(dy_GTC, v_GTC.mT)
        ds_GTT = torch.ops.aten._softmax_backward_data(dp_GTT, p_GTT, -1, p_GTT.dtype)
        scale = q_GTC.shape[-1] ** -0.5
        dq_GTC = torch.bmm(ds_GTT, k_GTC).mul_(scale)
        dk_GTC = torch.bmm(ds_GTT.mT, q_GTC).mul_(scale)
        return dq_GTC, dk_GTC, torch.bmm(p_GTT.mT, dy_GTC), None
