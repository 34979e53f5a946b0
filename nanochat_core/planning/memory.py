"""An estimate of the memory that training needs on a device, from one step on the meta device."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.optimizer import Multipliers, Optimizer


class LiveBytes(TorchDispatchMode):
    """A counter of the bytes of tensors that operations create, for as long as they are referenced. Tensors that
    existed before do not count.

    Attributes:
        bytes: bytes that are alive now; ``most``: the peak so far.

    ``torch.distributed._tools.MemTracker`` counts them too, and attributes bytes to modules and purposes. It is private
    to torch as well, requires the modules and optimizers to be registered, and runs every operation of every layer.
    This class, which a plan uses for many micro-batches, asks torch only once for each shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        self.bytes, self.most = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, *kwargs.values())):
            self._note(tensor.untyped_storage(), 0)
        result = self._made(func, args, kwargs) if _is_pure(func) else func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            self._note(storage, storage.nbytes())
        return result

    def _made(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of an operation whose only effect is one new tensor. Results are cached by arguments, since
        tensors on the meta device have no contents: layers repeat, and torch takes long to compute each shape."""
        try:
            key = (func, _facts(args), tuple((name, _facts(value)) for name, value in kwargs.items()))
            like = self._results.get(key)
        except TypeError:  # an argument that is not hashable
            return func(*args, **kwargs)
        if like is not None:
            return torch.empty_strided(*like[:2], dtype=like[2], device="meta")
        result = func(*args, **kwargs)
        like = result.size(), result.stride(), result.dtype
        if result.device.type == "meta":
            same = torch.empty_strided(*like[:2], dtype=like[2], device="meta")
            if result.untyped_storage().nbytes() == same.untyped_storage().nbytes():
                self._results[key] = like
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:  # a view
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.bytes += size
        self.most = max(self.most, self.bytes)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)  # the address may be used by another storage
        self.bytes -= size


@functools.cache
def _is_pure(func: Any) -> bool:
    """Whether the only effect of an operation is to return one new tensor."""
    returns = func._schema.returns
    values = [*func._schema.arguments, *returns]
    return [str(value.type) for value in returns] == ["Tensor"] and all(value.alias_info is None for value in values)


def _facts(argument: Any) -> Any:
    """Return the properties of an argument that determine the shape of a result."""
    if isinstance(argument, Tensor):
        return type(argument), argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, list | tuple):
        return tuple(map(_facts, argument))
    return type(argument), argument


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments or the result of an operation."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)


def estimate_memory(
    model: Model, optimizer: Optimizer, rows: int, length: int, *, accumulates: bool, state_bytes: int
) -> dict[str, int]:
    """Return the bytes that training needs on a device, by purpose; their sum is the peak of an optimizer step.

    The step runs on the meta device: forward and backward passes of [rows, length] tokens, then the update.
    "activations" is the peak of what the step creates, minus the gradients: tensors kept or recomputed for the backward
    pass, casts, and temporaries, those of the update included. Not counted are differences of compiled code, the
    temporaries of torch's own optimizers (fused ones have none), and messages between ranks.

    Args:
        model: on the meta device.
        optimizer: the optimizer of the model, built for one rank.
        rows: sequences per micro-batch.
        length: tokens per sequence.
        accumulates: whether a step has several micro-batches, so that gradients already exist during a forward pass.
        state_bytes: bytes of optimizer state on the device.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    memory = {"parameters": size + buffers, "gradients": gradients, "optimizer state": state_bytes}
    model.train()
    model.zero_grad(set_to_none=True)
    try:
        with LiveBytes() as alive:
            if accumulates:  # gradients of earlier micro-batches, to which those of this one are added
                loss = torch.zeros((), device="meta")
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            ids_BT, targets_BT = (torch.zeros(rows, length, dtype=torch.int64, device="meta") for _ in range(2))
            loss = model(ids_BT, targets_BT)
            memory["activations"] = max(0, alive.most - gradients)
            loss.backward()
            memory["activations"] = max(0, alive.most - gradients)
            optimizer.reduce()
            optimizer.update(1.0, Multipliers(0, 1, lr=1.0))
            memory["activations"] = max(0, alive.most - gradients)
    except (NotImplementedError, RuntimeError):
        pass  # an operation has no meta kernel: the estimate is what was counted so far
    model.zero_grad(set_to_none=True)
    return memory
