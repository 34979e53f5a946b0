"""The small pieces of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T in ``dtype``."""
    return F.linear(x.to(dtype), weight.to(dtype))


def embed(ids_BT: Tensor, weight_VD: Tensor) -> Tensor:
    return F.embedding(ids_BT, weight_VD)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def rotary_tables(
    start: int, stop: int, head_dim: int, base: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [start, stop), each float32 [stop - start, head_dim / 2]; computed in float64."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(start, stop, dtype=torch.float64), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rope_norm(x_BTHC: Tensor, rotary: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Turn each pair (x[c], x[c + C/2]) by its position's angle, then RMSNorm over the head."""
    cos, sin = (t[:, None, :] for t in rotary)
    x1, x2 = x_BTHC.chunk(2, dim=-1)
    y = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
    return rms_norm(y, eps).to(x_BTHC.dtype)
