"""Gradients summed over ranks in fixed buckets, and any torch optimizer behind the core's two-part contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_core.distributed.world import World
from nanochat_core.interfaces.optimizer import Multipliers, Optimizer


class _Bucket:
    """A flat run of gradients of one dtype that travels as one message."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.missing: set[int] = set()  # ids of parameters whose gradient has not come yet
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    def views(self) -> list[Tensor]:
        assert self.flat is not None
        pieces = self.flat.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]


class GradientReducer:
    """Sums gradients over ranks in flat buckets, sent while the backward pass still runs.

    The layout is decided here, from the parameters alone, and buckets are sent in one order, so that every step of
    every run sums alike. With one rank nothing is copied.

    Args:
        parameters: trainable parameters by name, in the model's order, the same on every rank.
        world: the ranks.
        bucket_bytes: size of a message, in bytes; a larger parameter has a message of its own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, bucket_bytes: float = 25e6) -> None:
        self.parameters = list(parameters.values())
        self.world = world
        self.buckets: list[_Bucket] = []
        self._handles: list[Any] = []
        self._sent = 0
        if world.size > 1:
            self._lay_out(bucket_bytes)

    def _lay_out(self, bucket_bytes: float) -> None:
        open_buckets: dict[tuple[torch.dtype, torch.device], tuple[_Bucket, float]] = {}
        for parameter in reversed(self.parameters):  # roughly the order in which a backward pass completes them
            key, size = (parameter.dtype, parameter.device), float(parameter.nbytes)
            bucket, filled = open_buckets.get(key, (None, 0.0))
            if bucket is None or filled + size > bucket_bytes:
                bucket, filled = _Bucket(), 0.0
                self.buckets.append(bucket)
            bucket.parameters.append(parameter)
            open_buckets[key] = (bucket, filled + size)

    def begin(self) -> None:
        """The next backward pass is the step's last: send each bucket once the pass has completed it."""
        self._disarm()
        for bucket in self.buckets:
            bucket.missing = {id(p) for p in bucket.parameters}
            hook = self._hook(bucket)
            self._handles += [p.register_post_accumulate_grad_hook(hook) for p in bucket.parameters]

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            bucket.missing.discard(id(parameter))
            # Collectives must start in one order on every rank: a bucket waits for those before it.
            while self._sent < len(self.buckets) and not self.buckets[self._sent].missing:
                self._send(self.buckets[self._sent])

        return arrived

    def _send(self, bucket: _Bucket) -> None:
        first = bucket.parameters[0]
        size = sum(p.numel() for p in bucket.parameters)
        if bucket.flat is None:
            bucket.flat = torch.empty(size, dtype=first.dtype, device=first.device)
        for view, parameter in zip(bucket.views(), bucket.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self._sent += 1

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sent = 0

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Wait for the sums and put them into ``grad``; a gradient missing everywhere becomes zeros.

        Returns:
            L2 norm of all gradients together, float32 (), the same on every rank.
        """
        self._exchange()
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
        """Clear the gradients. Between ``begin`` and ``finish`` it is collective: what one rank sent all must send."""
        if self._handles:
            self._exchange()
        for parameter in self.parameters:
            parameter.grad = None

    def _exchange(self) -> None:
        """Send what the backward pass did not, and wait for all."""
        for bucket in self.buckets[self._sent :]:
            self._send(bucket)
        self._disarm()
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all tensors together: float32 ()."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


class TorchOptimizer(Optimizer):
    """Any ``torch.optim.Optimizer`` behind the two-part contract.

    Each parameter group's ``lr`` is its base learning rate; the schedule multiplies it. A parameter stored in 16 bits
    is updated through a float32 copy, ``<name>/master`` in the state: it would round small updates away.

    Args:
        optimizer: built over the parameters below, and not used yet.
        parameters: trainable parameters by name, in the model's order.
        world: the ranks.
        state_tensors: state tensors of a parameter's size that the optimizer keeps (AdamW: 2).
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
        self._updated = {name: _wide(parameter) for name, parameter in self.parameters.items()}
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
        if not any(p.is_meta for p in self._updated.values()):  # where memory is planned there is nothing to compute
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
                raise KeyError(f"optimizer state for {name!r}, which is no parameter of the model")
            updated = self._updated[name]
            if what == "master":
                updated.copy_(value)
                continue
            # Steps stay where torch wants them (the CPU, unless fused); moments live beside their parameter.
            device = updated.device if value.shape == updated.shape or self._fused(updated) else "cpu"
            restored.setdefault(updated, {})[what] = value.to(device, copy=True)
        self.optimizer.state.clear()
        self.optimizer.state.update(restored)

    def _fused(self, parameter: nn.Parameter) -> bool:
        groups = [g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])]
        return any(g.get("fused") or g.get("capturable") for g in groups)

    def state_bytes(self) -> int:
        masters = sum(master.nbytes for _, master in self._copies())
        messages = sum(p.nbytes for bucket in self.reducer.buckets for p in bucket.parameters)  # they are kept
        return masters + messages + sum(self.state_tensors * p.nbytes for p in self._updated.values())


def _wide(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or a float32 copy of one with 16 bits."""
    return nn.Parameter(parameter.detach().float()) if parameter.dtype.itemsize < 4 else parameter
