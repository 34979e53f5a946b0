"""The operations of a block.

Most have a plain formula, which a compiler fuses, and an autograd function with few passes over memory, which makes
eager training on a CPU as fast as compiled training. Rotations and mean squares are float32 for every dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat_core import cast, wide_dtype
from nanochat_gpt.fp8 import fp8_linear


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype, fp8: bool = False) -> Tensor:
    """x W^T in ``dtype``, with x [..., I] and W [O, I]; with ``fp8`` computed in float8."""
    return fp8_linear(x, weight, dtype) if fp8 else F.linear(x.to(dtype), cast(weight, dtype))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def embed(ids_BT: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the embedding, [B, T, D]. Its gradient is summed in float32 and in a fixed order (compiled code would use
    atomic adds)."""
    if not (torch.is_grad_enabled() and weight_VD.requires_grad):
        return F.embedding(ids_BT, weight_VD)
    rows: Tensor = _Embed.apply(ids_BT, weight_VD)
    return rows


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_BT: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids_BT)
        ctx.rows, ctx.dtype = len(weight_VD), weight_VD.dtype
        return F.embedding(ids_BT, weight_VD)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[None, Tensor]:
        (ids_BT,) = ctx.saved_tensors
        grad_BTD = grad_BTD.to(wide_dtype(grad_BTD.dtype))
        return None, torch.ops.aten.embedding_dense_backward(grad_BTD, ids_BT, ctx.rows, -1, False).to(ctx.dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    if _by_hand():
        y: Tensor = _RMSNorm.apply(x, eps)
        return y
    return (x * _inverse_rms(x, eps)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm: y = r x with r = (mean(x^2) + eps)^-1/2; dx = r (dy - y mean(y dy))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        y = torch.mul(x, r).to(x.dtype)
        ctx.save_for_backward(y, r.to(x.dtype))
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        mean = torch.linalg.vecdot(y, dy).div_(y.shape[-1]).unsqueeze(-1)
        return torch.addcmul(dy, y, mean, value=-1).mul_(r), None


def mlp(x: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype, fp8: bool = False) -> Tensor:
    """relu(x U^T)^2 V^T in ``dtype``, with U [4 D, D] (up) and V [D, 4 D] (down); with ``fp8`` computed in float8."""
    if _by_hand() and not fp8:
        y: Tensor = _MLP.apply(x.to(dtype), cast(up, dtype), cast(down, dtype))
        return y
    return linear(F.relu(linear(x, up, dtype, fp8)).square(), down, dtype, fp8)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        a = F.linear(x, up).relu_()
        ctx.save_for_backward(x, up, down, a)
        return F.linear(a * a, down)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, up, down, a = ctx.saved_tensors
        # d(a^2) = 2 a da: doubling the weights is exact and saves a pass over the activations.
        dup = (dy @ (2 * down)).mul_(a)
        return dup @ up, _outer(dup, x), _outer(dy, a * a)  # a^2 is recomputed: cheaper than keeping it


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of a weight: the sum of dy x^T over positions."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def rotary_tables(start: int, stop: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [start, stop), each float64 [stop - start, head_dim / 2]."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(start, stop, dtype=torch.float64), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate each pair (x[c], x[c + C/2]) by the angle of its position; the result has the dtype of the tables.

    Rows whose positions differ have tables [B, T, C / 2].
    """
    cos, sin = cos_TC.unsqueeze(-2), sin_TC.unsqueeze(-2)
    x1, x2 = x_BTHC.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def split_heads(
    qkv_BTSC: Tensor, heads: int, kv_heads: int, cos_TC: Tensor, sin_TC: Tensor, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Split one product into queries, keys and values. Queries and keys are rotated, RMS-normed per head, and scaled.

    Args:
        qkv_BTSC: S = heads + 2 kv_heads heads of size C.
        scale: factor on queries and on keys.

    Returns:
        Queries [H, B, T, C], keys and values [K, B, T, C]: the matrices of each head are contiguous.
    """
    if _by_hand():
        q_HBTC, k_KBTC, v_KBTC = _RotateNorm.apply(qkv_BTSC, heads, kv_heads, cos_TC, sin_TC, eps, scale)
        return q_HBTC, k_KBTC, v_KBTC
    qk_BTSC, v_BTKC = qkv_BTSC.split([heads + kv_heads, kv_heads], dim=2)
    qk_BTSC = (rms_norm(rotate(qk_BTSC, cos_TC, sin_TC), eps) * scale).to(qkv_BTSC.dtype)
    q_HBTC, k_KBTC = qk_BTSC.permute(2, 0, 1, 3).split([heads, kv_heads])
    return q_HBTC, k_KBTC, v_BTKC.permute(2, 0, 1, 3)


class _RotateNorm(torch.autograd.Function):
    """Rotation and RMSNorm together. Rotation keeps lengths, so the order does not matter, and neither does it for
    mean(y dy).

    With y = s r x and r the inverse root mean square: dx = s r (dy - y mean(y dy) / s^2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTSC: Tensor,
        heads: int,
        kv_heads: int,
        cos_TC: Tensor,
        sin_TC: Tensor,
        eps: float,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _, C = qkv_BTSC.shape
        x_BTSC, v_BTKC = qkv_BTSC.split([heads + kv_heads, kv_heads], dim=2)
        r_BTS1 = _inverse_rms(x_BTSC, eps).mul_(scale)
        y_SBTC = qkv_BTSC.new_empty(heads + kv_heads, B, T, C)
        _rotate_into(y_SBTC.permute(1, 2, 0, 3), x_BTSC * r_BTS1, cos_TC.unsqueeze(-2), sin_TC.unsqueeze(-2))
        ctx.save_for_backward(y_SBTC, r_BTS1, cos_TC, sin_TC)
        ctx.scale = scale
        q_HBTC, k_KBTC = y_SBTC.split([heads, kv_heads])
        return q_HBTC, k_KBTC, v_BTKC.permute(2, 0, 1, 3).contiguous()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        y_SBTC, r_BTS1, cos_TC, sin_TC = ctx.saved_tensors
        (_, B, T, C), H, K = y_SBTC.shape, len(dq), len(dk)
        dqkv_BTSC = dq.new_empty(B, T, H + 2 * K, C)
        y_parts, r_parts = y_SBTC.split([H, K]), r_BTS1.split([H, K], dim=2)
        out_parts = dqkv_BTSC.split([H, K, K], dim=2)
        for dy, y, r, out in zip((dq, dk), y_parts, r_parts, out_parts, strict=False):
            mean = torch.linalg.vecdot(y, dy).div_(C * ctx.scale**2).unsqueeze(-1)
            dn = torch.addcmul(dy, y, mean, value=-1).permute(1, 2, 0, 3) * r
            _rotate_into(out, dn, cos_TC[:, None], -sin_TC[:, None])
        out_parts[2].copy_(dv.permute(1, 2, 0, 3))
        return dqkv_BTSC, None, None, None, None, None, None


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    x1, x2 = x.chunk(2, dim=-1)
    y1, y2 = out.chunk(2, dim=-1)
    y1.copy_((x1 * cos).addcmul_(x2, sin))
    y2.copy_((x2 * cos).addcmul_(x1, sin, value=-1))


def mix(x: Tensor, x0: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """r x + s x0, with trained scalars r and s."""
    if _by_hand():
        y: Tensor = _Mix.apply(x, x0, r, s)
        return y
    return (r * x + s * x0).to(x.dtype)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x0: Tensor, r: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, x0, r, s)
        return torch.mul(x, r).addcmul_(x0, s)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, x0, r, s = ctx.saved_tensors
        dr, ds = (torch.linalg.vecdot(z, dy).sum(dtype=r.dtype) for z in (x, x0))
        return dy * r, dy * s, dr, ds


def smear(x_BTD: Tensor, before_B1D: Tensor | None, weight_1G: Tensor, factor: Tensor) -> Tensor:
    """x_t + factor sigmoid(w . x_t[:G]) x_{t-1} for each position t: [B, T, D].

    Args:
        before_B1D: x before the first position, zeros where there is none; None: zeros everywhere.
        weight_1G: w.
        factor: a trained scalar.
    """
    gate_BT1 = factor * torch.sigmoid(F.linear(x_BTD[..., : weight_1G.shape[1]], weight_1G.to(x_BTD.dtype)))
    first_B1D = torch.zeros_like(x_BTD[:, :1]) if before_B1D is None else before_B1D
    return (x_BTD + gate_BT1 * torch.cat([first_B1D, x_BTD[:, :-1]], dim=1)).to(x_BTD.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    wide = wide_dtype(x.dtype)
    if _by_hand():
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)


def _by_hand() -> bool:
    return not torch.compiler.is_compiling()
