"""Head, softcap and cross-entropy in one operation, which computes the gradients in the forward pass.

The gradients are derived by hand. With u = h (W / cap)^T, t = tanh(u), logits s = cap t and p = softmax(s):

    loss = -log p[target]        ds = p - onehot(target)        dz = ds (1 - t^2)        dh = dz W        dW = dz^T h

where z = cap u are the logits before the cap. Because of the cap no p underflows, so the loss can be computed from p.

The core's cross-entropy works for any head: autograd differentiates each chunk, whose logits and their gradient are new
tensors. Here all chunks use the same three buffers, and rows of the softmax stay in the cache of a CPU core, which is
the reason for a second implementation. They share ``loss_with_gradients`` and ``without_ignored``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat_core import device_type, loss_with_gradients, wide_dtype, without_ignored

# With larger caps exp(-2 cap) / V comes near float32's smallest number.
MAX_CAP = 30.0


def scaled_head(weight_VD: Tensor, cap: float, dtype: torch.dtype) -> Tensor:
    """W / cap in ``dtype``. Dividing the weight saves a pass over the logits."""
    return (weight_VD / cap).to(dtype)


def chunk_sizes(vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Positions per matrix product, and positions whose float32 logits exist at once."""
    if device_type(device) == "cpu":
        return max(64, 2**23 // vocab_size), max(16, 2**19 // vocab_size)  # the second fits the cache of a core
    return max(1024, 2**28 // vocab_size), max(1024, 2**28 // vocab_size)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def softcap_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cap: float, dtype: torch.dtype, fused: bool = False
) -> Tensor:
    """Sum of cross-entropies of ``cap tanh(h W^T / cap)``, in nats: float32 (). Can be differentiated once.

    Args:
        hidden_ND: [N, D].
        weight_VD: float32 [V, D].
        targets_N: int64 [N], in [0, V) or -1, which is ignored.
        cap: in (0, MAX_CAP].
        dtype: of the matrix products.
        fused: compile the softmax and its gradient to two kernels. Unverified: it never ran on a GPU.
    """
    hidden_ND, targets_N = without_ignored(hidden_ND, targets_N)
    return loss_with_gradients(
        lambda: _softcap_cross_entropy(hidden_ND, weight_VD, targets_N, cap, dtype, fused), [hidden_ND, weight_VD]
    )


def _softcap_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cap: float, dtype: torch.dtype, fused: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients with respect to hidden states and weight."""
    (N, _), V = hidden_ND.shape, len(weight_VD)
    product_rows, softmax_rows = chunk_sizes(V, hidden_ND.device)
    product_rows, softmax_rows = min(product_rows, N), min(softmax_rows, N)
    hidden_ND = hidden_ND.to(dtype)
    scaled_VD, plain_VD = scaled_head(weight_VD, cap, dtype), weight_VD.to(dtype)
    wide = wide_dtype(dtype)
    # All chunks use the same memory, which stays in the cache.
    z_buffer = hidden_ND.new_empty(product_rows, V)
    t_buffer, p_buffer = (hidden_ND.new_empty(0 if fused else softmax_rows, V, dtype=wide) for _ in range(2))
    loss = hidden_ND.new_zeros((), dtype=wide)
    dhidden_ND, dweight_VD = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=wide)
    chunks = list(zip(*(x.split(product_rows) for x in (hidden_ND, dhidden_ND, targets_N)), strict=True))
    if hidden_ND.is_meta:  # only memory is counted, and every chunk takes the same
        chunks = chunks[:1]
    for h_ND, dh_ND, y_N in chunks:
        z_NV = z_buffer[: len(h_ND)]
        torch.mm(h_ND, scaled_VD.t(), out=z_NV)
        if fused:
            chunk_loss, z_NV = _compiled()(z_NV, y_N[:, None], cap)
            loss += chunk_loss
        else:
            for z, y in zip(z_NV.split(softmax_rows), y_N.split(softmax_rows), strict=True):
                loss += _loss_and_gradient(z, y[:, None], cap, t_buffer[: len(z)], p_buffer[: len(z)])
        torch.mm(z_NV, plain_VD, out=dh_ND)
        dweight_VD += z_NV.t() @ h_ND
    return loss.to(wide_dtype(hidden_ND.dtype)), [dhidden_ND, dweight_VD]


def _loss_and_gradient(u_NV: Tensor, targets_N1: Tensor, cap: float, t_NV: Tensor, p_NV: Tensor) -> Tensor:
    """Loss of a chunk. ``u_NV`` is overwritten with dz; ``t_NV`` and ``p_NV`` are buffers."""
    ignored_N1 = targets_N1 < 0
    targets_N1 = targets_N1.clamp_min(0)
    torch.tanh(t_NV.copy_(u_NV), out=t_NV)
    target_t_N1 = t_NV.gather(1, targets_N1)
    torch.softmax(torch.mul(t_NV, cap, out=p_NV), dim=-1, out=p_NV)
    log_p_N1 = p_NV.gather(1, targets_N1).log_()
    torch.ops.aten.tanh_backward.grad_input(p_NV, t_NV, grad_input=p_NV)  # p (1 - t^2), in one pass
    p_NV.scatter_add_(1, targets_N1, target_t_N1.square().sub_(1))
    if not u_NV.is_cpu:  # on the CPU they were removed before
        p_NV.masked_fill_(ignored_N1, 0)
    u_NV.copy_(p_NV)
    return -log_p_N1.masked_fill_(ignored_N1, 0).sum()


def plain_loss_and_gradient(u_NV: Tensor, targets_N1: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and dz, as a formula that a compiler turns into two passes. The softmax subtracts cap, which no s
    exceeds, in place of the maximum."""
    t_NV = torch.tanh(u_NV.float())
    e_NV = torch.exp(cap * (t_NV - 1))
    total_N1 = e_NV.sum(-1, keepdim=True)
    kept_N1 = targets_N1 >= 0
    target_t_N1 = torch.tanh(u_NV.gather(1, targets_N1.clamp_min(0)).float())
    loss_N1 = total_N1.log() - cap * (target_t_N1 - 1)
    one_hot_NV = torch.arange(u_NV.shape[1], device=u_NV.device) == targets_N1
    dz_NV = (e_NV / total_N1 - one_hot_NV.float()) * (1 - t_NV * t_NV) * kept_N1
    return torch.where(kept_N1, loss_N1, 0.0).sum(), dz_NV.to(u_NV.dtype)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return torch.compile(plain_loss_and_gradient, dynamic=False)
