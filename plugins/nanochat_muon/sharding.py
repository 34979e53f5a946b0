"""Gradients summed over ranks so that each rank gets its share, and updated shares given back to all.

Matrices of one shape travel in messages of as many as there are ranks: a rank owns one whole matrix of each. Any other
parameter is a message of its own, flat and cut into equal parts. Where things don't divide, zeros fill up. Small
parameters travel together and belong to all. With one rank there are no messages, and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_core import GradientExchange, World

SMALL = 1024  # elements a rank; of a parameter with fewer every rank owns all

# Newer torch has new names for them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@attrs.frozen(eq=False)
class Share:
    """What this rank owns of a parameter, and updates.

    Args:
        name: the parameter's.
        target: the parameter, or a flat piece of it (a view).
        start: of the piece, in the flat parameter.
        message: that brings its gradient; None with one rank.
        at: of the piece, in the part of the message that this rank owns.
    """

    name: str
    target: Tensor
    start: int = 0
    message: Message | None = None
    at: int = 0

    def gradient(self) -> Tensor:
        """Shaped like ``target``."""
        if self.message is None:
            assert self.target.grad is not None, "reduce gives every parameter a gradient"
            return self.target.grad
        assert self.message.sums is not None, "reduce comes before update"
        return self.within(self.message.sums)

    def within(self, part: Tensor) -> Tensor:
        """The piece's place in this rank's part of its message, a view shaped like ``target``."""
        return part[self.at : self.at + self.target.numel()].view(self.target.shape)

    def of(self, full: Tensor) -> Tensor:
        """The same piece of another tensor of the parameter's shape."""
        return full.reshape(-1)[self.start : self.start + self.target.numel()].view(self.target.shape)

    def collect(self, own: Tensor) -> Tensor:
        """The reverse: the whole tensor from every rank's ``own``, shaped like ``target``. Collective."""
        if self.message is None or self.message.part is None:
            return own
        part = own.new_zeros(self.message.part)
        self.within(part).copy_(own)
        (parameter,) = self.message.parameters
        return gather_rows(part, self.message.world).view(-1)[: parameter.numel()].view(parameter.shape)


class Message:
    """Parameters of one dtype, one after the other in a flat tensor.

    Args:
        parameters: by name, in that order.
        world: the ranks.
        part: elements that a rank owns, rank r those from r x part on; None: every rank owns all.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, part: int | None) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.world, self.part = world, part
        total = sum(p.numel() for p in self.parameters)
        self.size = total if part is None else part * world.size
        self.sums: Tensor | None = None  # of the gradients that this rank owns, flat
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None
        self.shares = self._own_shares()

    def _own_shares(self) -> list[Share]:
        first, last = (0, self.size) if self.part is None else (self.world.rank * self.part, self._own_end())
        shares, offset = [], 0
        for name, parameter in zip(self.names, self.parameters, strict=True):
            start, end = max(first, offset), min(last, offset + parameter.numel())
            if start < end:
                piece = parameter.detach()
                if end - start < parameter.numel():
                    piece = piece.view(-1)[start - offset : end - offset]
                shares.append(Share(name, piece, start - offset, self, start - first))
            offset += parameter.numel()
        return shares

    def _own_end(self) -> int:
        assert self.part is not None
        return (self.world.rank + 1) * self.part

    def _flat_of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The tensors one after the other, None as zeros, and zeros at the end; the tensor itself where it is all."""
        if len(tensors) == 1 and tensors[0] is not None and self._is_flat(tensors[0]):
            return tensors[0].view(-1)
        like = self.parameters[0]
        flat = torch.empty(self.size, dtype=like.dtype, device=like.device)
        for piece, tensor in zip(self._pieces(flat), tensors, strict=True):
            if tensor is None:
                piece.zero_()
            else:
                piece.copy_(tensor)
        flat[sum(p.numel() for p in self.parameters) :].zero_()
        return flat

    def _is_flat(self, tensor: Tensor) -> bool:
        return tensor.is_contiguous() and tensor.numel() == self.size

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of ``flat``, shaped like the parameters."""
        sizes = [p.numel() for p in self.parameters]
        pieces = flat[: sum(sizes)].split(sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    @torch.no_grad()
    def send(self) -> None:
        """Start summing the gradients, which are taken away from the parameters."""
        self._flat = self._flat_of([p.grad for p in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        if self.part is None:
            self.sums, self._work = self._flat, dist.all_reduce(self._flat, async_op=True)
        else:
            self.sums = self._flat.new_empty(self.part)
            self._work = _reduce_scatter(self.sums, self._flat, async_op=True)

    def wait(self) -> None:
        """Until ``sums`` are there."""
        assert self._work is not None
        self._work.wait()
        self._work = self._flat = None

    @torch.no_grad()
    def give(self) -> None:
        """Start giving what this rank owns of the parameters, updated, to all. Nothing where all own all."""
        if self.part is None:
            return
        whole = len(self.parameters) == 1 and self._is_flat(self.parameters[0])
        like = self.parameters[0].detach()
        self._flat = like.view(-1) if whole else like.new_empty(self.size)
        own = self._flat[self.world.rank * self.part : self._own_end()]
        if not whole:
            own.zero_()
            for share in self.shares:
                share.within(own).copy_(share.target)
        self._work = _all_gather(self._flat, own, async_op=True)

    @torch.no_grad()
    def take(self) -> None:
        """Put what ``give`` brought into the parameters."""
        if self._work is None:
            return
        self._work.wait()
        assert self._flat is not None
        if self._flat.data_ptr() != self.parameters[0].data_ptr():
            for parameter, piece in zip(self.parameters, self._pieces(self._flat), strict=True):
                parameter.copy_(piece)
        self._work = self._flat = None


def lay_out(parameters: Mapping[str, nn.Parameter], matrices: Collection[str], world: World) -> list[Message]:
    """The messages: decided from the parameters alone, so that every step of every run sums alike.

    Args:
        parameters: by name, in the model's order, the same on every rank.
        matrices: names of those that a rank must own as a whole.
    """
    if world.size == 1:
        return []
    position = {name: index for index, name in enumerate(parameters)}
    whole: dict[Any, list[str]] = {}
    small: dict[Any, list[str]] = {}
    messages = []
    for name in reversed(list(parameters)):  # roughly the order in which a backward pass completes them
        parameter = parameters[name]
        if name in matrices:
            whole.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(name)
        elif parameter.numel() < SMALL * world.size or not parameter.is_contiguous():
            small.setdefault((parameter.dtype, parameter.device), []).append(name)
        else:
            part = math.ceil(parameter.numel() / world.size)
            messages.append(Message({name: parameter}, world, part))
    for (shape, *_), names in whole.items():
        for start in range(0, len(names), world.size):
            some = {n: parameters[n] for n in names[start : start + world.size]}
            messages.append(Message(some, world, math.prod(shape)))
    messages += [Message({n: parameters[n] for n in names}, world, None) for names in small.values()]
    return sorted(messages, key=lambda m: -min(position[n] for n in m.names))


class Exchange:
    """Sums gradients over ranks while the backward pass still runs, in an order that the first step teaches.

    Args:
        parameters: all of them.
        messages: of them, from ``lay_out``.
        world: the ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], messages: Sequence[Message], world: World) -> None:
        self.parameters, self.messages, self.world = list(parameters), list(messages), world
        self._exchange = GradientExchange(messages, world, learn_order=True)

    def begin(self) -> None:
        """The next backward pass is the step's last: send each message once the pass has completed it."""
        self._exchange.begin()

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Wait for the sums. Gradients that are missing count as zeros.

        Returns:
            L2 norm of all summed gradients together, float32 (), the same on every rank.
        """
        if self.world.size == 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return _norm([p.grad for p in self.parameters if p.grad is not None], self.world).float()
        self._exchange.finish()
        own = [m.sums for m in self.messages if m.sums is not None and (m.part is not None or self.world.is_main)]
        square = _norm(own, self.world).square()
        self.world.all_reduce(square)
        return square.sqrt().float()

    def discard(self) -> None:
        """Clear the gradients. Between ``begin`` and ``finish`` it is collective: what one rank sent all must send."""
        if self._exchange.started:
            self._exchange.finish()
        for message in self.messages:
            message.sums = None
        for parameter in self.parameters:
            parameter.grad = None


def _norm(tensors: Sequence[Tensor], world: World) -> Tensor:
    """L2 norm of all tensors together: (), float64 where the device has it, so that it can be squared and summed over
    ranks. (The core's ``GradientReducer``, whose ranks have all gradients, needs float32 only.)"""
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    if not tensors:
        return torch.zeros((), dtype=dtype, device=world.device)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide)).to(dtype))


def gather_rows(own: Tensor, world: World) -> Tensor:
    """[size, ...] on the CPU: every rank's tensor of one shape. Collective."""
    everyone = own.new_empty(world.size * own.numel())
    _all_gather(everyone, own.reshape(-1).contiguous())
    return everyone.view(world.size, *own.shape).cpu()
