"""The ledger row of a step, and the remarks that are printed about it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import attrs

from nanochat_core.planning.plan import Plan
from nanochat_core.runs.state import TrainState
from nanochat_core.training.step import StepOutcome


@attrs.define
class StepTimer:
    """A timer of one step, which starts when it is created.

    Args:
        started: time at which the step began, in seconds of ``time.perf_counter``.
        data_wait: seconds that the loop waited for data.
    """

    started: float = attrs.field(factory=time.perf_counter)
    data_wait: float = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Return a context whose duration is counted as waiting for data."""
        started = time.perf_counter()
        yield
        self.data_wait = time.perf_counter() - started

    def seconds(self) -> float:
        """Return the seconds since the step began."""
        return time.perf_counter() - self.started


@attrs.frozen
class StepRow:
    """The record of a step.

    Args:
        values: values of its ledger row, by metric name.
        remarks: lines to print and log.
    """

    values: dict[str, float | str]
    remarks: list[str]


@attrs.frozen
class Measured:
    """Measurements of a step.

    Args:
        seconds: duration of the step, including the wait for data.
        data_wait: seconds of waiting for data.
        lr_multiplier: factor on every learning rate.
        peak_flops: peak FLOPs per second of a device.
        peak_memory: peak memory of this process, in MiB.
    """

    seconds: float
    data_wait: float
    lr_multiplier: float
    peak_flops: float
    peak_memory: float


def step_row(outcome: StepOutcome, state: TrainState, plan: Plan, measured: Measured, *, crops: bool) -> StepRow:
    """Return the row of a completed step. Updates the running averages in ``state``, so call it once per step.

    Args:
        state: already advanced by the step.
        crops: whether the packing crops documents; if so, the row has ``train/cropped``.
    """
    step, loss, norm = state.step - 1, outcome.loss, outcome.grad_norm
    values: dict[str, float | str] = {"train/loss": loss}
    remarks: list[str] = []
    if outcome.finite:
        if (spike := state.spike(loss)) is not None:
            mean, deviations = spike
            values["train/loss_spike"] = deviations
            remarks.append(
                f"step {step}: the loss spikes: {loss:.4f}, {deviations:.1f} standard deviations above {mean:.4f} "
                f"(gradient norm {norm:.4g})"
            )
        values["train/loss_ema"] = state.smooth(loss)
    else:
        values["train/skipped"] = state.skipped
        remarks.append(f"step {step}: loss {loss}, gradient norm {norm}: not finite, the update is skipped")
    if plan.scales_loss:
        values["train/loss_scale"] = state.loss_scale
    per_second = outcome.tokens / measured.seconds
    values |= {
        "train/grad_norm": norm,
        "train/lrm": measured.lr_multiplier,
        "train/dt": measured.seconds,
        "train/tok_per_sec": per_second,
        "train/mfu": 100 * plan.flops_per_token * per_second / (measured.peak_flops * plan.world_size),
        "train/epoch": outcome.epoch,
        "train/data_wait": measured.data_wait,
        "train/peak_memory": measured.peak_memory,
        "total_training_flops": plan.flops_per_token * state.tokens,
        "total_training_time": state.training_time,
    }
    if crops:
        values["train/cropped"] = outcome.lost_tokens / (outcome.lost_tokens + outcome.tokens)
    return StepRow(values, remarks)
