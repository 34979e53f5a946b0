"""TrainState: the state of a run besides parameters and optimizer state. Plain data, one JSON file in a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nanochat_core.files import shorten
from nanochat_core.runs.soundness import is_count, is_number

EMA_DECAY = 0.9
SPREAD_DECAY = 0.98  # of the squared distance between losses and the EMA before them
# A loss is a spike if it is above the EMA by this many standard deviations and by this fraction of the EMA, after the
# first steps, which only collect statistics.
SPIKE_DEVIATIONS, SPIKE_PART, SPIKE_AFTER = 6.0, 0.1, 50
# As torch.amp.GradScaler: 2^16 for the mean of a micro-batch, doubled after this many finite steps in a row, halved
# after any other.
FIRST_LOSS_SCALE, GROWTH_STEPS = 2.0**16, 2000


@attrs.define
class TrainState:
    """The state of a run besides parameters and optimizer state.

    Args:
        step: optimizer steps done.
        tokens: target tokens trained on.
        lanes: number of data lanes, pinned for the run's life.
        cursors: lane to its data cursor (three integers), after ``step`` steps.
        loss_ema: EMA of the loss, not yet debiased.
        loss_spread: EMA of the squared distance of losses from the EMA before them, not yet debiased.
        loss_scale: factor on the loss for float16 gradients; 0 until it is set.
        scaled_steps: finite steps since the loss scale last changed.
        training_time: seconds of steps, excluding the first 10 after each start.
        skipped: steps skipped for a loss or gradient that was not finite.
        minimum: smallest value seen of each evaluation metric.
        ledger_bytes: length of the ledger that belongs to this state.
        comparable_from: first step whose evaluations used the current validation data.
        fingerprints: of the tokenizer and of both splits of the data (``tokenizer``, ``train``, ``val``).
    """

    step: int = 0
    tokens: int = 0
    lanes: int = 0
    cursors: dict[int, tuple[int, int, int]] = attrs.field(factory=dict)
    loss_ema: float = 0.0
    loss_spread: float = 0.0
    loss_scale: float = 0.0
    scaled_steps: int = 0
    training_time: float = 0.0
    skipped: int = 0
    minimum: dict[str, float] = attrs.field(factory=dict)
    ledger_bytes: int = 0
    comparable_from: int = 0
    fingerprints: dict[str, str] = attrs.field(factory=dict)

    def smooth(self, loss: float) -> float:
        """Update the EMA with the loss of a step; returns the debiased EMA. Call after ``step`` has been advanced."""
        count = self.step - self.skipped
        if count > 1:
            distance = loss - self.loss_ema / (1 - EMA_DECAY ** (count - 1))
            self.loss_spread = SPREAD_DECAY * self.loss_spread + (1 - SPREAD_DECAY) * distance**2
        self.loss_ema = EMA_DECAY * self.loss_ema + (1 - EMA_DECAY) * loss
        return self.loss_ema / (1 - EMA_DECAY**count)

    def spike(self, loss: float) -> tuple[float, float] | None:
        """Return, if ``loss`` is a spike, the EMA of the losses so far, and how many standard deviations ``loss`` is
        above it; None otherwise. Call before ``smooth``, with ``step`` advanced."""
        count = self.step - self.skipped - 1
        if count < SPIKE_AFTER:
            return None
        mean = self.loss_ema / (1 - EMA_DECAY**count)
        deviation = max(math.sqrt(self.loss_spread / (1 - SPREAD_DECAY ** (count - 1))), 1e-9)
        stands_out = loss - mean > max(SPIKE_DEVIATIONS * deviation, SPIKE_PART * mean)
        return (mean, (loss - mean) / deviation) if stands_out else None

    def begin_loss_scale(self, tokens: int) -> None:
        """Set the initial scale for summed losses of micro-batches of ``tokens``, unless one is set."""
        if not self.loss_scale:
            self.loss_scale = FIRST_LOSS_SCALE / 2 ** round(math.log2(tokens))

    def adapt_loss_scale(self, finite: bool) -> None:
        """Update the loss scale after a step."""
        self.scaled_steps = self.scaled_steps + 1 if finite else 0
        if not finite:
            self.loss_scale /= 2
        elif self.scaled_steps == GROWTH_STEPS:
            self.loss_scale, self.scaled_steps = 2 * self.loss_scale, 0

    def note_minimum(self, metrics: Mapping[str, float | str]) -> None:
        """Keep the smallest value of each metric."""
        for name, value in metrics.items():
            if isinstance(value, float):
                self.minimum[name] = min(value, self.minimum.get(name, value))

    def to_json(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "cursors": {str(lane): list(c) for lane, c in sorted(self.cursors.items())}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainState:
        """The state that ``to_json`` returned.

        Raises:
            ValueError: when it is none, saying why.
        """
        wanted = {field.name: field for field in attrs.fields(cls)}
        if content.keys() - wanted.keys() or {"step", "cursors", "lanes"} - content.keys():
            raise ValueError(f"it must have {', '.join(wanted)}, not {shorten(', '.join(content))}")
        for name, value in content.items():
            if not _RIGHT.get(name, is_count)(value):
                raise ValueError(f"{name} must not be {shorten(value)}")
        cursors = {int(lane): (a, b, c) for lane, (a, b, c) in content["cursors"].items()}
        if content["lanes"] and any(lane >= content["lanes"] for lane in cursors):
            raise ValueError(f"it has cursors of more than {content['lanes']} lanes")
        return cls(**{**content, "cursors": cursors})


def _are_cursors(value: object) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch(r"\d{1,9}", lane, re.ASCII)
        and isinstance(cursor, list)
        and len(cursor) == 3
        and all(map(is_count, cursor))
        for lane, cursor in value.items()
    )


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and is_number(value) and value >= 0


# What each entry of a state must be; the others are counts.
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "cursors": _are_cursors,
    "loss_ema": is_number,
    "loss_spread": _is_amount,
    "loss_scale": _is_amount,
    "training_time": _is_amount,
    "minimum": lambda value: isinstance(value, dict) and all(map(_is_metric, value.values())),
    "fingerprints": lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
}


def _is_metric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's random-number generators: uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())
