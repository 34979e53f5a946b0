"""Linear layers whose three matrix products (forward and two gradients) are in float8, with one scale per tensor.

Activations and weights are cast to e4m3, incoming gradients to e5m2 (Micikevicius et al., FP8 formats for
deep learning, arXiv:2209.05433): each is divided by its largest magnitude over the largest number of the format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat_core import cuda_capability

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_problem(device: torch.device) -> str:
    """Reason why a device can't train with float8 products; empty when it can."""
    if device.type != "cuda":
        return f"it needs a Hopper or newer GPU, this is a {device.type.upper()} device"
    capability = cuda_capability(device)
    if capability < (9, 0):
        return f"it needs a Hopper or newer GPU, not one of compute capability {'.'.join(map(str, capability))}"
    return ""


def fp8_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T in ``dtype``, computed in float8; its gradients are computed in float8 too.

    Args:
        x: [..., I]; I and the number of rows are multiples of 16.
        weight: [O, I]; O is a multiple of 16.
        dtype: of the result and of the gradient of x.
    """
    y: Tensor = _Fp8Linear.apply(x.to(dtype).flatten(0, -2), weight.to(dtype))
    return y.view(*x.shape[:-1], len(weight))


def quantize(x: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in the format ``to``, and the scale, float32 (). The largest magnitude becomes the format's largest."""
    largest = torch.finfo(to).max
    scale = x.abs().amax().float().clamp_min(1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(to), scale


def _product(a: tuple[Tensor, Tensor], b_transposed: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """a b, with b given as its transpose: the hardware needs rows of a and columns of b contiguous in memory."""
    (x, scale_x), (y, scale_y) = a, b_transposed
    return torch._scaled_mm(x, y.t(), scale_a=scale_x, scale_b=scale_y, out_dtype=dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        x, w = quantize(x_NI, FORWARD), quantize(weight_OI, FORWARD)
        ctx.save_for_backward(*x, *w)
        ctx.dtype = x_NI.dtype
        return _product(x, w, x_NI.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, Tensor]:
        x_NI, scale_x, w_OI, scale_w = ctx.saved_tensors
        dy, scale_dy = quantize(dy_NO, BACKWARD)
        dx_NI = _product((dy, scale_dy), (w_OI.t().contiguous(), scale_w), ctx.dtype)
        dw_OI = _product((dy.t().contiguous(), scale_dy), (x_NI.t().contiguous(), scale_x), ctx.dtype)
        return dx_NI, dw_OI
