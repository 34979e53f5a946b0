"""Dtypes to compute in, and casts of weights, made once while the weights do not change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# (weight, its version, the cast) by the weight's id and the dtype; None where weights may change.
_casts: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] | None = None


@contextlib.contextmanager
def weights_at_rest() -> Iterator[None]:
    """Inside, ``cast`` keeps what it makes, which takes the memory of the casts; afterwards it is let go."""
    global _casts
    before = _casts
    _casts = {} if before is None else before
    try:
        yield
    finally:
        _casts = before


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)`` for a parameter (not for what is computed from one): during an evaluation it is made once
    instead of in every forward pass. With gradients on nothing is kept."""
    if torch.is_grad_enabled() or _casts is None or weight.dtype is dtype:
        return weight.to(dtype)
    kept = _casts.get((id(weight), dtype))
    if kept is None or kept[1] != weight._version:  # an optimizer or a loaded file would have changed it
        kept = _casts[id(weight), dtype] = (weight, weight._version, weight.to(dtype))
    return kept[2]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums, statistics and optimizer state of what is stored in ``dtype``: float32, or float64 for
    float64."""
    return torch.promote_types(dtype, torch.float32)
