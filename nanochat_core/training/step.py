"""One optimizer step on all ranks: forward and backward passes, sums over ranks, and the update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from nanochat_core.data.loader import Step
from nanochat_core.distributed.world import World
from nanochat_core.hardware.casting import autocast
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.optimizer import Multipliers, Optimizer
from nanochat_core.interfaces.types import IGNORED, Batch
from nanochat_core.planning.out_of_memory import is_out_of_memory
from nanochat_core.runs.state import restore_rng, rng_state


@attrs.frozen
class StepOutcome:
    """The result of a step, the same on every rank except for ``memory_error``.

    A step that is not ``done`` changed nothing, because a rank had no data or no memory for it; its loss, norm and
    counts are not valid. One that is not ``finite`` changed no parameter and no buffer.

    Args:
        stop_requested: whether any rank was asked to stop.
        data_missing: whether any rank was asked to stop while it waited for data.
        out_of_memory: whether any rank ran out of memory.
        memory_error: torch's message when this rank ran out of memory; empty otherwise.
        data_ended: whether any rank has no data left for another step.
        loss: mean cross-entropy, nats per token.
        grad_norm: L2 norm of the gradient of that mean, before clipping.
        tokens: number of targets on all ranks.
        lost_tokens: tokens of all ranks that packing cut off or dropped.
        epoch: passes over the data so far, the mean of all ranks.
        finite: whether loss and gradient are finite; otherwise the update was skipped.
    """

    stop_requested: bool = False
    data_missing: bool = False
    out_of_memory: bool = False
    memory_error: str = ""
    data_ended: bool = False
    loss: float = math.nan
    grad_norm: float = math.nan
    tokens: int = 0
    lost_tokens: float = 0.0
    epoch: float = 0.0
    finite: bool = False

    @property
    def done(self) -> bool:
        """Whether every rank had data and memory for the step."""
        return not (self.data_missing or self.out_of_memory)


@attrs.frozen
class StepTotals:
    """The numbers that are summed over ranks in a step: one rank's part before the exchange, the sums afterwards.

    Args:
        loss: summed cross-entropy, nats. A rank's own part stays on the device, as the argument of ``pack``.
        tokens: number of targets.
        stop_requested: number of ranks that were asked to stop.
        data_missing: number of ranks that have no data for this step.
        out_of_memory: number of ranks that ran out of memory.
        data_ended: number of ranks that have no data left for another step.
        lost_tokens: number of tokens that packing cut off or dropped.
        epoch: passes over the data, divided by the number of ranks.
    """

    loss: float = 0.0
    tokens: float = 0.0
    stop_requested: float = 0.0
    data_missing: float = 0.0
    out_of_memory: float = 0.0
    data_ended: float = 0.0
    lost_tokens: float = 0.0
    epoch: float = 0.0

    def pack(self, loss_sum: Tensor) -> Tensor:
        """Return the numbers as one tensor, without waiting for the device.

        Args:
            loss_sum: this rank's summed loss, (), which is used instead of ``loss``.

        Returns:
            float64 [number of fields] on the device of the loss; float32 on MPS, which has no float64.
        """
        dtype = torch.float32 if loss_sum.device.type == "mps" else torch.float64
        _, *rest = attrs.astuple(self)
        return torch.cat([loss_sum.to(dtype).reshape(1), torch.tensor(rest, dtype=dtype, device=loss_sum.device)])

    @classmethod
    def unpack(cls, values: Sequence[float]) -> StepTotals:
        """Create totals from the values of a tensor that ``pack`` returned."""
        names = [field.name for field in attrs.fields(cls)]
        return cls(**dict(zip(names, values, strict=True)))


@attrs.frozen
class _Passes:
    """The results of the forward and backward passes of a step on this rank.

    Args:
        loss_sum: summed cross-entropy in nats, (), on the device.
        tokens: number of targets.
        memory_error: torch's message when memory ran out, which ended the passes; empty otherwise.
    """

    loss_sum: Tensor
    tokens: int
    memory_error: str


def run_step(
    step: Step | None,
    model: Model,
    optimizer: Optimizer,
    world: World,
    *,
    dtype: torch.dtype,
    multipliers: Multipliers,
    grad_clip: float,
    loss_scale: float = 1.0,
    stop_requested: bool = False,
) -> StepOutcome:
    """Run one optimizer step. Collective.

    The host waits for the device once, when the sums over ranks are read. A rank without data, or without memory for
    them, still takes part in the collectives, because other ranks may already wait in them.

    Args:
        step: this rank's data; None when it was asked to stop while it waited for them.
        dtype: of matrix products.
        multipliers: factors of the schedule for this step.
        grad_clip: largest global gradient norm; 0 is off.
        loss_scale: factor on the loss that keeps float16 gradients in range.
        stop_requested: whether this rank was asked to stop.
    """
    generators, buffers = rng_state(world.device), _buffers(model)
    passes = _forward_backward(step.batches if step is not None else [], model, optimizer, world, dtype, loss_scale)
    norm_of_sums = optimizer.reduce()
    totals = StepTotals(
        tokens=passes.tokens,
        stop_requested=stop_requested,
        data_missing=step is None,
        out_of_memory=bool(passes.memory_error),
        data_ended=step.is_last if step is not None else 0,
        lost_tokens=step.cropped + step.dropped if step is not None else 0,
        epoch=step.epoch / world.size if step is not None else 0.0,
    )
    totals, norm = _exchange(totals, passes.loss_sum, norm_of_sums, world)
    outcome = StepOutcome(
        stop_requested=totals.stop_requested > 0,
        data_missing=totals.data_missing > 0,
        out_of_memory=totals.out_of_memory > 0,
        memory_error=passes.memory_error,
        data_ended=totals.data_ended > 0,
    )
    if not outcome.done:
        optimizer.discard()
        _restore(buffers)
        restore_rng(generators, world.device)
        return outcome
    loss, norm = totals.loss / totals.tokens, norm / totals.tokens / loss_scale
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        clip = min(1.0, grad_clip / (norm + 1e-6)) if grad_clip else 1.0
        optimizer.update(clip / totals.tokens / loss_scale, multipliers)
    else:
        optimizer.discard()
        _restore(buffers)
    return attrs.evolve(
        outcome,
        loss=loss,
        grad_norm=norm,
        tokens=int(totals.tokens),
        lost_tokens=totals.lost_tokens,
        epoch=totals.epoch,
        finite=finite,
    )


_Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]  # module, name, the buffer, and a copy of its content


def _buffers(model: Model) -> _Buffers:
    """Return the buffers of a model, which its forward pass may change, with copies."""
    named = [(module, *pair) for module in model.modules() for pair in module.named_buffers(recurse=False)]
    return [(module, name, buffer, buffer.detach().clone()) for module, name, buffer in named]


def _restore(buffers: _Buffers) -> None:
    with torch.no_grad():
        for module, name, buffer, content in buffers:
            if not torch.equal(buffer, content):  # some can't be written, such as those that are expanded
                buffer.copy_(content)
            if getattr(module, name) is not buffer:  # the forward pass has put another in its place
                setattr(module, name, buffer)


def _forward_backward(
    batches: Sequence[Batch], model: Model, optimizer: Optimizer, world: World, dtype: torch.dtype, loss_scale: float
) -> _Passes:
    """Add up the gradients of the micro-batches, times ``loss_scale``; call ``begin_reduce`` before the last one."""
    loss_sum = torch.zeros((), device=world.device)
    tokens, reducing, memory_error = 0, False, ""
    for index, batch in enumerate(batches):
        tokens += int((batch.targets_BT != IGNORED).sum())
        if index == len(batches) - 1:
            optimizer.begin_reduce()
            reducing = True
        try:
            loss_sum += loss_and_gradients(model, batch.to(world.device), dtype, loss_scale)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            memory_error = str(error)
        if memory_error:  # after the except clause, which frees the traceback and its activations
            break
    if not reducing:
        optimizer.begin_reduce()
    return _Passes(loss_sum, tokens, memory_error)


def loss_and_gradients(model: Model, batch: Batch, dtype: torch.dtype, loss_scale: float = 1.0) -> Tensor:
    """Add the gradients of a micro-batch, times ``loss_scale``, to the accumulated ones.

    Args:
        batch: on the model's device.
        dtype: of matrix products.

    Returns:
        The summed cross-entropy in nats, float32 ().
    """
    with autocast(batch.ids_BT.device, dtype):
        loss: Tensor = model(batch.ids_BT, batch.targets_BT)
    (loss if loss_scale == 1.0 else loss * loss_scale).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _exchange(totals: StepTotals, loss_sum: Tensor, norm: Tensor, world: World) -> tuple[StepTotals, float]:
    """Return the sums over all ranks, and the value of ``norm``, which is the same on every rank.

    This is the only synchronization of host and device in a step.
    """
    sums = totals.pack(loss_sum)
    world.all_reduce(sums)
    *summed, norm_value = torch.cat([sums, norm.to(sums.dtype).reshape(1)]).tolist()
    return StepTotals.unpack(summed), norm_value
