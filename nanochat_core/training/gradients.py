"""Gradients summed over ranks in fixed buckets, and an adapter for torch optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_core.distributed.world import World
from nanochat_core.errors import PluginError
from nanochat_core.interfaces.optimizer import Multipliers, Optimizer


class GradientMessage(Protocol):
    """Gradients that are summed over ranks in one collective."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]: ...

    def send(self) -> None:
        """Start the collective. A gradient that is None counts as zeros."""

    def wait(self) -> None:
        """Wait for the sums."""


class GradientExchange:
    """The messages of a step's gradients, each sent while the backward pass still runs, once it is complete.

    Collectives must start in the same order on every rank, so a message waits for those before it. The first exchange
    uses the order of ``messages``; with ``learn_order``, later ones use the order in which rank 0's first backward pass
    completed them. The messages define how gradients are laid out and summed.

    Args:
        messages: the same on every rank.
        world: the ranks.
        learn_order: whether to learn that order, which takes one broadcast.
    """

    def __init__(self, messages: Sequence[GradientMessage], world: World, learn_order: bool = False) -> None:
        self.messages, self.world = list(messages), world
        self._order = list(range(len(self.messages)))
        self._completed: list[int] | None = [] if learn_order else None  # None once the order is learnt
        self._missing: list[set[int]] = []  # per message: ids of parameters without a gradient so far
        self._sent = 0
        self._too_late = False
        self._handles: list[Any] = []

    @property
    def started(self) -> bool:
        """Whether ``begin`` was called and ``finish`` was not: then ``finish`` must follow on every rank."""
        return bool(self._handles)

    def begin(self) -> None:
        """Prepare for the last backward pass of the step, which sends each message once it is complete."""
        assert not self.started, "call finish before the next begin"
        self._missing = [{id(p) for p in message.parameters} for message in self.messages]
        for index, message in enumerate(self.messages):
            hook = self._hook(index)
            self._handles += [p.register_post_accumulate_grad_hook(hook) for p in message.parameters]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            missing = self._missing[index]
            if id(parameter) not in missing and index in self._order[: self._sent]:
                self._too_late = True
            missing.discard(id(parameter))
            if not missing and self._completed is not None and index not in self._completed:
                self._completed.append(index)
            while self._sent < len(self._order) and not self._missing[self._order[self._sent]]:
                self._send_next()

        return arrived

    def _send_next(self) -> None:
        self.messages[self._order[self._sent]].send()
        self._sent += 1

    def finish(self) -> None:
        """Send the messages that the backward pass did not send, and wait for all. Collective, also without ``begin``.

        Raises:
            PluginError: when a gradient was accumulated after its message was sent.
        """
        started, too_late = self.started, self._too_late
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._sent < len(self._order):
            self._send_next()
        self._sent, self._too_late = 0, False
        for message in self.messages:
            message.wait()
        if started and self._completed is not None:
            self._learn_order(self._completed)
        if too_late:
            raise PluginError(
                "the gradient of a parameter was accumulated in several parts in one backward pass, which is not "
                "supported with several ranks: checkpoint activations with use_reentrant=False"
            )

    def _learn_order(self, completed: list[int]) -> None:
        order: list[int] = self.world.broadcast_object(completed)
        self._order = [*order, *(i for i in range(len(self.messages)) if i not in order)]
        self._completed = None


class _Bucket:
    """Gradients of one dtype in a flat tensor, which are summed over ranks in one collective."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None

    def views(self) -> list[Tensor]:
        """Return views of the sums, shaped like the parameters."""
        assert self._flat is not None
        pieces = self._flat.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def send(self) -> None:
        if self._flat is None:
            first, size = self.parameters[0], sum(p.numel() for p in self.parameters)
            self._flat = torch.empty(size, dtype=first.dtype, device=first.device)
        for view, parameter in zip(self.views(), self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        self._work = dist.all_reduce(self._flat, async_op=True)

    def wait(self) -> None:
        assert self._work is not None
        self._work.wait()


class GradientReducer:
    """The sum of gradients over ranks, in flat buckets that are sent while the backward pass still runs.

    The layout depends on the parameters alone, and buckets are sent in a fixed order, so that every step of every run
    sums in the same way. With one rank nothing is copied.

    Args:
        parameters: trainable parameters by name, in the model's order, the same on every rank.
        world: the ranks.
        bucket_bytes: size of a bucket, in bytes; a larger parameter has a bucket of its own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, bucket_bytes: float = 25e6) -> None:
        self.parameters = list(parameters.values())
        self.buckets = _lay_out(self.parameters, bucket_bytes) if world.size > 1 else []
        self.exchange = GradientExchange(self.buckets, world)

    def begin(self) -> None:
        """Prepare for the last backward pass of the step, which sends each bucket once it is complete."""
        self.exchange.begin()

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Wait for the sums and put them into ``grad``; a gradient that no rank has becomes zeros.

        Returns:
            L2 norm of all gradients together, float32 (), the same on every rank.
        """
        self.exchange.finish()
        for bucket in self.buckets:
            for view, parameter in zip(bucket.views(), bucket.parameters, strict=True):
                if parameter.grad is None:
                    parameter.grad = view.clone()
                else:
                    parameter.grad.copy_(view)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return global_norm([p.grad for p in self.parameters if p.grad is not None])

    def discard(self) -> None:
        """Clear the gradients. Collective between ``begin`` and ``finish``, as every rank must send all messages."""
        if self.exchange.started:
            self.exchange.finish()
        for parameter in self.parameters:
            parameter.grad = None


def _lay_out(parameters: Sequence[nn.Parameter], bucket_bytes: float) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[_Bucket, float]] = {}
    for parameter in reversed(parameters):  # roughly the order in which a backward pass completes them
        key, size = (parameter.dtype, parameter.device), float(parameter.nbytes)
        bucket, filled = open_buckets.get(key, (None, 0.0))
        if bucket is None or filled + size > bucket_bytes:
            bucket, filled = _Bucket(), 0.0
            buckets.append(bucket)
        bucket.parameters.append(parameter)
        open_buckets[key] = (bucket, filled + size)
    return buckets


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors together: float32 (). Sum squared norms over ranks in float64."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


class TorchOptimizer(Optimizer):
    """An adapter of any ``torch.optim.Optimizer`` to the core's ``Optimizer``.

    Each parameter group's ``lr`` is its base learning rate; the schedule multiplies it. A parameter stored in 16 bits,
    which would round small updates away, is updated through a float32 copy, ``<name>/master`` in the state.

    Args:
        optimizer: built over ``parameters``, and not used yet.
        parameters: trainable parameters by name, in the model's order.
        world: the ranks.
        state_tensors: number of state tensors per parameter, each of its size (AdamW: 2).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        world: World,
        state_tensors: int = 2,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = dict(parameters)
        self.reducer = GradientReducer(parameters, world)
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.state_tensors = state_tensors
        # What the optimizer updates: the parameter, or its float32 copy.
        self._updated = {name: _float32_copy(parameter) for name, parameter in self.parameters.items()}
        updated = {id(self.parameters[name]): p for name, p in self._updated.items()}
        for group in optimizer.param_groups:
            group["params"] = [updated[id(p)] for p in group["params"]]

    def begin_reduce(self) -> None:
        self.reducer.begin()

    def reduce(self) -> Tensor:
        return self.reducer.finish()

    @torch.no_grad()
    def update(self, scale: float, multipliers: Multipliers) -> None:
        for parameter, master in self._copies():
            assert parameter.grad is not None, "reduce gives every parameter a gradient"
            master.grad = parameter.grad.to(master.dtype)
        torch._foreach_mul_([p.grad for p in self._updated.values() if p.grad is not None], scale)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * multipliers.lr
        if not any(p.is_meta for p in self._updated.values()):  # on the meta device only memory is planned
            self.optimizer.step()
        for parameter, master in self._copies():
            parameter.copy_(master)
            master.grad = None
        self.discard()

    def _copies(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(p, self._updated[n]) for n, p in self.parameters.items() if self._updated[n] is not p]

    def discard(self) -> None:
        self.reducer.discard()

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, updated in self._updated.items():
            kept = self.optimizer.state.get(updated, {})
            state.update({f"{name}/{key}": torch.as_tensor(value) for key, value in kept.items()})
            if updated is not self.parameters[name]:
                state[f"{name}/master"] = updated.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        restored: dict[Tensor, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, what = key.rpartition("/")
            if name not in self.parameters:
                raise KeyError(f"optimizer state for {name!r}, which is not a parameter of the model")
            updated = self._updated[name]
            if what == "master":
                updated.copy_(value)
                continue
            # Step counts stay where torch expects them (the CPU, unless fused); moments are on the parameter's device.
            device = updated.device if value.shape == updated.shape or self._fused(updated) else "cpu"
            restored.setdefault(updated, {})[what] = value.to(device, copy=True)
        self.optimizer.state.clear()
        self.optimizer.state.update(restored)

    def _fused(self, parameter: nn.Parameter) -> bool:
        groups = [g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])]
        return any(g.get("fused") or g.get("capturable") for g in groups)

    def state_bytes(self) -> int:
        masters = sum(master.nbytes for _, master in self._copies())
        messages = sum(p.nbytes for bucket in self.reducer.buckets for p in bucket.parameters)  # kept between steps
        return masters + messages + sum(self.state_tensors * p.nbytes for p in self._updated.values())


def _float32_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Return the parameter, or a float32 copy if it is stored in 16 bits."""
    return nn.Parameter(parameter.detach().float()) if parameter.dtype.itemsize < 4 else parameter
