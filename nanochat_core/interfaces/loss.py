"""Cross-entropy of a model's head, chunked over positions so that the logits of a whole batch are never in memory.

For a summed loss under autograd the gradients are computed in the forward pass, chunk by chunk: the logits of a chunk
are computed, used for loss and gradients, and freed. Peak memory is that of one chunk's logits instead of the batch's.

Autograd differentiates each chunk, so that any head works. A model with a known head can compute the gradients by
formula, in buffers that all chunks share; ``loss_with_gradients`` and ``without_ignored`` can be used for that too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanochat_core.hardware.casting import wide_dtype
from nanochat_core.hardware.devices import device_type
from nanochat_core.interfaces.types import IGNORED as IGNORED

# Logits per chunk. On a CPU they should fit into the cache; on a GPU they must be many enough to keep it busy.
CHUNK_ELEMENTS_CPU = 2**21
CHUNK_ELEMENTS = 2**26


class HasLogits(Protocol):
    """The part of the ``Model`` interface that a loss needs."""

    vocab_size: int

    def logits(self, hidden_ND: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@torch.compiler.disable  # type: ignore[untyped-decorator]
def cross_entropy(
    model: HasLogits, hidden_BTD: Tensor, targets_BT: Tensor, reduction: Literal["sum", "none"] = "sum"
) -> Tensor:
    """Return the cross-entropy of ``model.logits(hidden_BTD)`` in nats; ignored targets (-1) give 0.

    ``model.logits`` may be any differentiable function of its argument and of the model's parameters. Under autograd
    a summed loss can be differentiated once.

    Args:
        model: the model, of which ``logits`` and ``vocab_size`` are used.
        hidden_BTD: [B, T, D], of any floating dtype.
        targets_BT: int64 [B, T].
        reduction: "sum" for a float32 (), "none" for float32 [B, T].
    """
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    rows = chunk_rows(model.vocab_size, hidden_BTD.device)
    if not torch.is_grad_enabled():
        loss_N = torch.cat(
            [_losses(model.logits(h), t) for h, t in zip(*_split(rows, hidden_ND, targets_N), strict=True)]
        )
        return loss_N.sum() if reduction == "sum" else loss_N.view_as(targets_BT)
    if reduction == "none":
        return _losses(model.logits(hidden_ND), targets_N).view_as(targets_BT)
    hidden_ND, targets_N = without_ignored(hidden_ND, targets_N)
    if len(targets_N) == 0:
        return hidden_ND.to(wide_dtype(hidden_ND.dtype)).sum()  # 0, but connected to the graph
    head = head_parameters(model, hidden_ND)
    return loss_with_gradients(
        lambda: _chunked_cross_entropy(model.logits, rows, targets_N, hidden_ND, head), [hidden_ND, *head]
    )


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Return the number of positions whose logits are computed at once."""
    elements = CHUNK_ELEMENTS_CPU if device_type(device) == "cpu" else CHUNK_ELEMENTS
    return max(64, elements // vocab_size)


_heads: weakref.WeakKeyDictionary[HasLogits, tuple[tuple[int, ...], list[Tensor]]] = weakref.WeakKeyDictionary()


def head_parameters(model: HasLogits, hidden_ND: Tensor) -> list[Tensor]:
    """Return the trainable parameters that ``model.logits`` uses, found by a call with one position and then cached."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    ids = tuple(map(id, trainable))
    if model not in _heads or _heads[model][0] != ids:
        with torch.enable_grad():
            logits_1V = model.logits(hidden_ND[:1].detach().requires_grad_())
            grads = torch.autograd.grad(logits_1V.sum(), trainable, allow_unused=True) if trainable else ()
        _heads[model] = (ids, [p for p, g in zip(trainable, grads, strict=True) if g is not None])
    return _heads[model][1]


def _losses(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")


def _split(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [t.split(rows) for t in tensors]


def _chunked_cross_entropy(
    logits: Callable[[Tensor], Tensor], rows: int, targets_N: Tensor, hidden_ND: Tensor, head: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the sum of the cross-entropies, and its gradients by the hidden states and by parameters of the head."""
    wants_hidden = hidden_ND.requires_grad
    losses: list[Tensor] = []
    hidden_grads: list[Tensor] = []
    head_grads: list[Tensor] = []
    chunks = list(zip(*_split(rows, hidden_ND, targets_N), strict=True))
    if hidden_ND.is_meta and len(chunks) > 2:  # planning only: from the second on, every chunk takes the same memory
        hidden_grads, chunks = [torch.empty_like(hidden_ND[2 * rows :])] * wants_hidden, chunks[:2]
    for h, t in chunks:
        h = h.detach().requires_grad_(wants_hidden)
        with torch.enable_grad():
            loss = F.cross_entropy(logits(h), t, ignore_index=IGNORED, reduction="sum")
        inputs = [h, *head] if wants_hidden else list(head)
        # The meta device, where models are planned, has no autocast.
        with torch.autocast("cpu" if h.is_meta else h.device.type, enabled=False):
            grads = list(torch.autograd.grad(loss, inputs)) if inputs else []
        losses.append(loss.detach())
        if wants_hidden:
            hidden_grads.append(grads.pop(0))
        if head_grads:
            torch._foreach_add_(head_grads, grads)
        else:
            head_grads = grads
    return torch.stack(losses).sum(), [torch.cat(hidden_grads) if wants_hidden else None, *head_grads]


# The functions below can also be used by losses that a model computes itself.


def without_ignored(hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Remove, on a CPU, the positions of hidden states and targets whose target is ignored (-1).

    On other devices both are returned unchanged, since counting the positions would synchronize with the device.

    Args:
        hidden_ND: [N, D] hidden states.
        targets_N: int64 [N] targets.
    """
    if not (hidden_ND.is_cpu and bool((targets_N == IGNORED).any())):
        return hidden_ND, targets_N
    kept = (targets_N != IGNORED).nonzero().squeeze(1)
    return hidden_ND.index_select(0, kept), targets_N.index_select(0, kept)


def loss_with_gradients(
    compute: Callable[[], tuple[Tensor, Sequence[Tensor | None]]], inputs: Sequence[Tensor]
) -> Tensor:
    """Return a loss in autograd's graph whose gradients are computed together with it, and only scaled in backward.

    Use it for a loss over logits that are too large to keep until the backward pass. It can be differentiated once.

    Args:
        compute: called once, while autograd records nothing. It returns the loss, (), and its gradient by each of
            ``inputs``, of the same shape; None where none is needed.
        inputs: the tensors that the loss depends on.
    """
    loss: Tensor = _LossWithGradients.apply(compute, *inputs)
    return loss


class _LossWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[], tuple[Tensor, Sequence[Tensor | None]]], *inputs: Tensor) -> Tensor:
        loss, grads = compute()
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors))
