"""Sharding over ranks: each rank gets the summed gradients of its shares, and updated shares are gathered by all ranks.

Matrices of one shape are sent in messages of as many matrices as there are ranks: a rank owns one whole matrix of each
message. Any other parameter is a message of its own, flat and split into equal parts. Messages are padded with zeros.
Small parameters are sent together, and every rank owns them. With one rank there are no messages and no copies.
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

SMALL = 1024  # elements per rank; every rank owns parameters with fewer

# Newer versions of torch have new names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@attrs.frozen(eq=False)
class Share:
    """The share of a parameter that this rank owns and updates.

    Args:
        name: of the parameter.
        target: the parameter, or a flat piece of it (a view).
        start: position of the piece in the flat parameter.
        message: the message with its gradient; None with one rank.
        at: position of the piece in this rank's part of the message.
    """

    name: str
    target: Tensor
    start: int = 0
    message: Message | None = None
    at: int = 0

    def gradient(self) -> Tensor:
        """Gradient of the share, shaped like ``target``."""
        if self.message is None:
            assert self.target.grad is not None, "reduce gives every parameter a gradient"
            return self.target.grad
        assert self.message.sums is not None, "reduce comes before update"
        return self.within(self.message.sums)

    def within(self, part: Tensor) -> Tensor:
        """The share's elements in ``part``, this rank's part of its message: a view shaped like ``target``."""
        return part[self.at : self.at + self.target.numel()].view(self.target.shape)

    def of(self, full: Tensor) -> Tensor:
        """The share's elements of ``full``, a tensor shaped like the parameter, as a tensor shaped like ``target``."""
        return full.reshape(-1)[self.start : self.start + self.target.numel()].view(self.target.shape)

    def collect(self, own: Tensor) -> Tensor:
        """The whole tensor, gathered from each rank's ``own``, which is shaped like ``target``. Collective."""
        if self.message is None or self.message.part is None:
            return own
        part = own.new_zeros(self.message.part)
        self.within(part).copy_(own)
        (parameter,) = self.message.parameters
        return gather_rows(part, self.message.world).view(-1)[: parameter.numel()].view(parameter.shape)


class Message:
    """Parameters of one dtype that are sent together, one after the other in a flat tensor.

    Args:
        parameters: by name, in the order of the tensor.
        world: the ranks.
        part: number of elements that a rank owns: rank r owns those from r x part on; None: every rank owns all.
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
        """The tensors one after the other, padded with zeros, with None as zeros. A single tensor is not copied."""
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
        """Start the sum of the gradients over ranks. The parameters' gradients become None."""
        self._flat = self._flat_of([p.grad for p in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        if self.part is None:
            self.sums, self._work = self._flat, dist.all_reduce(self._flat, async_op=True)
        else:
            self.sums = self._flat.new_empty(self.part)
            self._work = _reduce_scatter(self.sums, self._flat, async_op=True)

    def wait(self) -> None:
        """Wait for ``sums``."""
        assert self._work is not None
        self._work.wait()
        self._work = self._flat = None

    @torch.no_grad()
    def start_gather(self) -> None:
        """Start to gather the updated parts of all ranks, unless every rank owns all parameters."""
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
    def finish_gather(self) -> None:
        """Wait for the gathered parts, and copy them to the parameters."""
        if self._work is None:
            return
        self._work.wait()
        assert self._flat is not None
        if self._flat.data_ptr() != self.parameters[0].data_ptr():
            for parameter, piece in zip(self.parameters, self._pieces(self._flat), strict=True):
                parameter.copy_(piece)
        self._work = self._flat = None


def lay_out(parameters: Mapping[str, nn.Parameter], matrices: Collection[str], world: World) -> list[Message]:
    """Distribute parameters over messages. The result depends on the parameters only, so that every step of every run
    sums in the same order.

    Args:
        parameters: by name, in the model's order, equal on all ranks.
        matrices: names of the parameters that a rank must own as a whole.
        world: the ranks.
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
    """Sums of gradients over ranks during the backward pass, in the order that is observed in the first step.

    Args:
        parameters: all parameters.
        messages: their messages, from ``lay_out``.
        world: the ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], messages: Sequence[Message], world: World) -> None:
        self.parameters, self.messages, self.world = list(parameters), list(messages), world
        self._exchange = GradientExchange(messages, world, learn_order=True)

    def begin(self) -> None:
        """Announce the last backward pass of the step: each message is sent when its gradients are complete."""
        self._exchange.begin()

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Wait for the sums. Missing gradients count as zeros.

        Returns:
            L2 norm of all summed gradients together, float32 (), equal on all ranks.
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
        """Clear the gradients. Between ``begin`` and ``finish`` this is collective: all ranks must send the same."""
        if self._exchange.started:
            self._exchange.finish()
        for message in self.messages:
            message.sums = None
        for parameter in self.parameters:
            parameter.grad = None


def _norm(tensors: Sequence[Tensor], world: World) -> Tensor:
    """L2 norm of all tensors together: (), float64 where the device supports it, so that it can be squared and summed
    over ranks. (The core's ``GradientReducer``, whose ranks have all gradients, needs float32 only.)"""
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    if not tensors:
        return torch.zeros((), dtype=dtype, device=world.device)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide)).to(dtype))


def gather_rows(own: Tensor, world: World) -> Tensor:
    """Tensors of all ranks, of one shape, as [world size, ...] on the CPU. Collective."""
    everyone = own.new_empty(world.size * own.numel())
    _all_gather(everyone, own.reshape(-1).contiguous())
    return everyone.view(world.size, *own.shape).cpu()
