"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal, as the update.

Options, each a paper's: Polar Express (arXiv:2505.16932), row equilibration (MuonEq, arXiv:2603.28254),
renormalisation (arXiv:2602.21545), variance reduction (NorMuon, arXiv:2510.05491), cautious decay (arXiv:2510.12402).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_core import wide_dtype
from nanochat_muon.config import MuonAdamWConfig

# Coefficients of a polynomial a x + b x^3 + c x^5: a steep slope at 0, so that few steps bring singular values near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# One triple a step, each the best after those before it; for singular values up to 1 / 1.01 (safety 2e-2, cushion 2).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_MARGIN = 1.01

# Least divisors: zero gradients give zero updates. They sit far below what training meets.
LEAST_NORM = 1e-7  # of a gradient
LEAST_ROW = 1e-12  # of one of its rows
LEAST_MOMENT = 1e-10  # of NorMuon; the rows of an orthogonal matrix have 1 / max(rows, columns)


def orthogonalize(
    g_GRC: Tensor, steps: int, dtype: torch.dtype, *, polar_express: bool = False, row_equilibration: bool = False
) -> Tensor:
    """The matrices with their singular values moved near 1.

    Args:
        g_GRC: G matrices of one shape.
        steps: iterations; with ``polar_express`` at most 5.
        dtype: what it computes in; the result has it too.
        polar_express: its coefficients instead of Newton-Schulz's.
        row_equilibration: bring all rows to one norm first.
    """
    coefficients = POLAR_EXPRESS[:steps] if polar_express else (NEWTON_SCHULZ,) * steps
    norm = _equal_rows(g_GRC) if row_equilibration else _frobenius(g_GRC)
    if polar_express:
        norm = norm * POLAR_EXPRESS_MARGIN
    x_GRC = (g_GRC / norm).to(dtype)
    wide = x_GRC.shape[1] <= x_GRC.shape[2]
    for a, b, c in coefficients:
        gram = torch.bmm(x_GRC, x_GRC.mT) if wide else torch.bmm(x_GRC.mT, x_GRC)  # over the smaller side
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (polynomial, x_GRC) if wide else (x_GRC, polynomial)
        x_GRC = torch.baddbmm(x_GRC, left, right, beta=a)
    return x_GRC


def _frobenius(g_GRC: Tensor) -> Tensor:
    """[G, 1, 1]."""
    return torch.linalg.vector_norm(g_GRC, dim=(1, 2), keepdim=True).clamp_min(LEAST_NORM)


def _equal_rows(g_GRC: Tensor) -> Tensor:
    """[G, R, 1]: divided by these, all rows have one norm and the matrix has 1.

    Which norm the rows get (MuonEq: their mean) does not matter, as the division by the Frobenius norm follows.
    """
    rows_GR1 = torch.linalg.vector_norm(g_GRC, dim=2, keepdim=True)
    divisor_GR1 = rows_GR1.clamp_min(LEAST_ROW)
    return divisor_GR1 * _frobenius(rows_GR1 / divisor_GR1)


def _rescale(x_GRC: Tensor, renormalize: bool, variance: Tensor | None, beta2: float) -> Tensor:
    """What orthogonalised matrices are multiplied by: [G, 1, 1], or [G, R, 1] or [G, 1, C] with variance reduction.

    All of it follows from the mean squares of rows (columns), so one pass over the matrices is enough.

    Args:
        variance: second moment, [G, R, 1], of wide matrices [G, 1, C]; updated in place. It starts at zero and needs
            no correction for that, as the total norm is restored.
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
    """Gives the update the size that its shape should have."""
    return max(1.0, rows / columns) ** 0.5


def variance_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of NorMuon's second moment: one number a row, or a column of a wide matrix."""
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
    """One step of G matrices of one shape [R, C], in place.

    In order: momentum (Nesterov), row equilibration, orthogonalisation, renormalisation, variance reduction, decay and
    update. With lr times ``shape_factor``: p <- p - lr (update + decay p).

    Args:
        parameters: G of them.
        grads: theirs; left as they are.
        buffer_GRC: momentum, float32.
        variance: NorMuon's second moment, see ``variance_shape``, float32; None: no variance reduction.
        config: which of the steps are taken, and what does not change from step to step. With
            ``cautious_weight_decay`` only entries with update x p >= 0 decay: also those whose update is 0.
        scale: factor on the gradients.
        lr, momentum, weight_decay: of this step, used instead of the config's.
        dtype: what ``orthogonalize`` computes in.
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
