"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal, as the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Newton-Schulz polynomial a x + b x^3 + c x^5: a steep slope at 0, so that few steps bring singular values near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(g_GRC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The matrices with their singular values moved near 1, each by ``steps`` Newton-Schulz iterations.

    Args:
        g_GRC: G matrices of one shape.
        dtype: what it computes in; the result has it too.
    """
    a, b, c = NEWTON_SCHULZ
    tall = g_GRC.shape[1] > g_GRC.shape[2]
    norm_G11 = torch.linalg.vector_norm(g_GRC, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    x = (g_GRC / norm_G11).to(dtype)
    x = x.mT.contiguous() if tall else x  # the products below are over the smaller side
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def shape_factor(rows: int, columns: int) -> float:
    """Gives the update the size that its shape should have."""
    return max(1.0, rows / columns) ** 0.5


@torch.no_grad()
def muon_update(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffer_GRC: Tensor,
    *,
    scale: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    steps: int,
    dtype: torch.dtype,
) -> None:
    """One step of G matrices of one shape [R, C], in place.

    Args:
        parameters: G of them.
        grads: theirs; left as they are.
        buffer_GRC: momentum, float32.
        scale: factor on the gradients.
    """
    g_GRC = torch.stack(list(grads)).to(buffer_GRC.dtype).mul_(scale)
    buffer_GRC.lerp_(g_GRC, 1 - momentum)
    g_GRC.lerp_(buffer_GRC, momentum)  # Nesterov
    update_GRC = orthogonalize(g_GRC, steps, dtype)
    lr = lr * shape_factor(*g_GRC.shape[1:])
    if weight_decay:
        torch._foreach_mul_(list(parameters), 1 - lr * weight_decay)
    torch._foreach_add_(list(parameters), list(update_GRC.to(parameters[0].dtype).unbind()), alpha=-lr)
