"""Dtypes by name, autocast, and casts of weights that are made once while the weights do not change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

# (weight, its version, the cast) by the weight's id and the dtype; (ids and versions of weights, what was made of them)
# by the function that made it.
_Casts: TypeAlias = dict[Any, Any]
T = TypeVar("T")

# Casts kept by the innermost ``weights_at_rest``; None outside, where weights may change. It is not an argument,
# because ``cast`` is called deep inside models, whose forward pass has no place for it.
_casts: ContextVar[_Casts | None] = ContextVar("casts of weights at rest", default=None)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as ``bfloat16``."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is not a dtype")
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as ``bfloat16``, as experiments and plans write it."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products on ``device`` are computed in ``dtype``; float32 leaves everything as it is.

    Args:
        device: of any type but meta, for which torch has no autocast.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


@contextlib.contextmanager
def weights_at_rest(casts: _Casts | None = None) -> Iterator[None]:
    """Return a context in which ``cast`` keeps its results, in the same thread; their memory is freed afterwards.

    Args:
        casts: a dict that keeps them longer; None: they are kept until the end of the outermost context.
    """
    kept = _casts.get()
    if kept is None:
        kept = {} if casts is None else casts
    token = _casts.set(kept)
    try:
        yield
    finally:
        _casts.reset(token)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``weight.to(dtype)`` of a parameter (not of a tensor computed from one).

    In ``weights_at_rest`` it is computed once instead of in every forward pass. With gradients enabled nothing is kept.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # torch can't compile what reads a ContextVar
        return weight.to(dtype)
    casts = _casts.get()
    if casts is None or weight.dtype is dtype:
        return weight.to(dtype)
    kept = casts.get((id(weight), dtype))
    if kept is None or kept[1] != weight._version:  # an optimizer or a loaded checkpoint has changed it
        kept = casts[id(weight), dtype] = (weight, weight._version, weight.to(dtype))
    result: Tensor = kept[2]
    return result


def kept_at_rest(make: Callable[[], T], weights: Sequence[Tensor], *, only_if_made: bool = False) -> T | None:
    """Return what ``make`` makes of parameters: in ``weights_at_rest`` it is called once while none of them changes.

    None elsewhere and with gradients enabled, where keeping it is not possible.

    Args:
        make: a function, or a method of the model, that is the same one in every call.
        only_if_made: return None instead of calling it.
    """
    casts = _casts.get()
    if casts is None or torch.is_grad_enabled():
        return None
    versions = tuple((id(weight), weight._version) for weight in weights)
    kept = casts.get(make)
    if kept is None or kept[0] != versions:
        if only_if_made:
            return None
        kept = casts[make] = (versions, make())
    made: T = kept[1]
    return made


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums, statistics and optimizer state of tensors in ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
