"""How much memory training will need on a device, before it is there: one pass on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat_core.interfaces import Model, Optimizer


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as somebody holds them.

    Args:
        known: tensors that are there already and don't count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes, self.most = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.bytes += size
        self.most = max(self.most, self.bytes)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)  # another storage may get it
        self.bytes -= size


def estimate_memory(model: Model, optimizer: Optimizer, rows: int, length: int) -> dict[str, int]:
    """Bytes a device needs in training, by purpose.

    Activations are the most that is alive at once, parameters and their gradients left out, in a forward and backward
    pass of [rows, length] tokens on the meta device: what is kept for the backward pass, and what is computed again.

    Args:
        model: on the meta device.
    """
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    memory = {"parameters": size, "gradients": size, "optimizer state": optimizer.state_bytes()}
    gradients = [torch.zeros_like(p) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.requires_grad else None
    ids_BT = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    try:
        with _Alive([*parameters, *gradients, *model.buffers(), ids_BT]) as alive:
            loss = model(ids_BT, ids_BT)
            memory["activations"] = alive.most
            loss.backward()
            memory["activations"] = alive.most
    except (NotImplementedError, RuntimeError):
        pass  # an operation without a meta kernel: no estimate, or one without what the backward pass adds
    model.zero_grad(set_to_none=True)
    return memory
