"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon): orthogonalized momentum as the update.

Options, each from a paper: Polar Express (arXiv:2505.16932), row equilibration (MuonEq, arXiv:2603.28254),
renormalization (arXiv:2602.21545), variance reduction (NorMuon, arXiv:2510.05491), cautious decay (arXiv:2510.12402).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_core import wide_dtype
from nanochat_muon.config import MuonAdamWConfig

# Coefficients of a x + b x^3 + c x^5, whose steep slope at 0 brings singular values near 1 in few iterations.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# One triple per iteration, each optimal after the previous ones, for singular values up to 1 / 1.01 (safety 2e-2,
# cushion 2).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_MARGIN = 1.01

# Smallest divisors, so that zero gradients give zero updates. They are far below values in training.
LEAST_NORM = 1e-7  # of a gradient
LEAST_ROW = 1e-12  # of one of its rows
LEAST_MOMENT = 1e-10  # second moment of NorMuon; that of the rows of an orthogonal matrix is 1 / max(rows, columns)


def orthogonalize(
    g_GRC: Tensor, steps: int, dtype: torch.dtype, *, polar_express: bool = False, row_equilibration: bool = False
) -> Tensor:
    """Move the singular values of matrices near 1.

    Args:
        g_GRC: G matrices of shape [R, C].
        steps: number of iterations; with ``polar_express`` at most 5.
        dtype: of the computation and of the result.
        polar_express: use the coefficients of Polar Express, not those of Newton-Schulz.
        row_equilibration: scale all rows to the same norm first.

    Returns:
        [G, R, C].
    """
    coefficients = POLAR_EXPRESS[:steps] if polar_express else (NEWTON_SCHULZ,) * steps
    norm = _equal_rows(g_GRC) if row_equilibration else _frobenius(g_GRC)
    if polar_express:
        norm = norm * POLAR_EXPRESS_MARGIN
    x_GRC = (g_GRC / norm).to(dtype)
    wide = x_GRC.shape[1] <= x_GRC.shape[2]
    for a, b, c in coefficients:
        gram = torch.bmm(x_GRC, x_GRC.mT) if wide else torch.bmm(x_GRC.mT, x_GRC)  # the smaller Gram matrix
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (polynomial, x_GRC) if wide else (x_GRC, polynomial)
        x_GRC = torch.baddbmm(x_GRC, left, right, beta=a)
    return x_GRC


def _frobenius(g_GRC: Tensor) -> Tensor:
    """Frobenius norms, [G, 1, 1]."""
    return torch.linalg.vector_norm(g_GRC, dim=(1, 2), keepdim=True).clamp_min(LEAST_NORM)


def _equal_rows(g_GRC: Tensor) -> Tensor:
    """Divisors that give all rows the same norm and the matrix the Frobenius norm 1: [G, R, 1].

    Which norm the rows get (MuonEq: their mean) does not matter, as the division by the Frobenius norm follows.
    """
    rows_GR1 = torch.linalg.vector_norm(g_GRC, dim=2, keepdim=True)
    divisor_GR1 = rows_GR1.clamp_min(LEAST_ROW)
    return divisor_GR1 * _frobenius(rows_GR1 / divisor_GR1)


def _rescale(x_GRC: Tensor, renormalize: bool, variance: Tensor | None, beta2: float) -> Tensor:
    """Factors for orthogonalized matrices: [G, 1, 1]; with variance reduction [G, R, 1], or [G, 1, C] for wide ones.

    They follow from the mean squares of rows (columns), so one pass over the matrices is enough.

    Args:
        x_GRC: the matrices.
        renormalize: set the Frobenius norm to sqrt(min(R, C)).
        variance: second moment, [G, R, 1], of wide matrices [G, 1, C]; updated in place; None: no variance reduction.
            It starts at zero and needs no correction for that, as the total norm is restored.
        beta2: decay rate of the second moment.
    """
    rows, columns = x_GRC.shape[1:]
    dim = 2 if rows >= columns else 1
    wide = wide_dtype(x_GRC.dtype)
    square = torch.linalg.vector_norm(x_GRC, dim=dim, keepdim=True, dtype=wide).square_().div_(x_GRC.shape[dim])

    def total(mean_square: Tensor) -> Tensor:  # squared Frobenius norm
        return mean_square.sum(dim=(1, 2), keepdim=True) * x_GRC.shape[dim]

    factor = torch.ones_like(square[:, :1, :1])
    if renormalize:
        factor = (min(rows, columns) / total(square).clamp_min(LEAST_NORM**2)).sqrt()
        square = square * factor.square()
    if variance is not None:
        variance.lerp_(square, 1 - beta2)
        inverse = variance.clamp_min(LEAST_MOMENT).rsqrt()
        kept = total(square) / total(square * inverse.square()).clamp_min(LEAST_NORM**2)
        factor = factor * inverse * kept.sqrt()
    return factor


def shape_factor(rows: int, columns: int) -> float:
    """Factor on the learning rate of a matrix: sqrt(rows / columns), at least 1."""
    return max(1.0, rows / columns) ** 0.5


def variance_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of NorMuon's second moment: one number per row, or per column of a wide matrix."""
    return (rows, 1) if rows >= columns else (1, columns)


@torch.no_grad()
def muon_update(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffer_GRC: Tensor,
    variance: Tensor | None,
    config: MuonAdamWConfig,
    *,
    scale: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> None:
    """Update G matrices of shape [R, C] in place.

    In order: momentum (Nesterov), row equilibration, orthogonalization, renormalization, variance reduction, decay and
    update. With lr times ``shape_factor``: p <- p - lr (update + decay p).

    Args:
        parameters: G matrices.
        grads: their gradients, which are not changed.
        buffer_GRC: momentum, float32, updated in place.
        variance: NorMuon's second moment, float32, of shape [G, *variance_shape(R, C)], updated in place; None: no
            variance reduction.
        config: which of the operations are done, and constants. With ``cautious_weight_decay`` only entries with
            update x p >= 0 decay, which includes those whose update is 0.
        scale: factor on the gradients.
        lr, momentum, weight_decay: values for this step, used instead of those of the config.
        dtype: of orthogonalization.
    """
    g_GRC = torch.stack(list(grads)).to(buffer_GRC.dtype).mul_(scale)
    buffer_GRC.lerp_(g_GRC, 1 - momentum)
    g_GRC.lerp_(buffer_GRC, momentum)  # Nesterov
    update_GRC = orthogonalize(
        g_GRC,
        config.ns_steps,
        dtype,
        polar_express=config.polar_express,
        row_equilibration=config.row_equilibration,
    )
    wide = buffer_GRC.dtype
    if config.renormalize or variance is not None:
        factor = _rescale(update_GRC, config.renormalize, variance, config.variance_beta2)
        update_GRC = update_GRC.to(wide).mul_(factor)
    lr = lr * shape_factor(*g_GRC.shape[1:])
    if weight_decay and config.cautious_weight_decay:
        p_GRC, update_GRC = torch.stack(list(parameters)).to(wide), update_GRC.to(wide)
        agree_GRC = (update_GRC * p_GRC).ge_(0)
        update_GRC.addcmul_(p_GRC, agree_GRC, value=weight_decay)
    elif weight_decay:
        torch._foreach_mul_(list(parameters), 1 - lr * weight_decay)
    torch._foreach_add_(list(parameters), list(update_GRC.to(parameters[0].dtype).unbind()), alpha=-lr)
