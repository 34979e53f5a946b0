"""TrainState: where a run stands, besides parameters and optimizer state. Plain data, one JSON file in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

EMA_DECAY = 0.9


@attrs.define
class TrainState:
    """Args:
    step: optimizer steps done.
    tokens: target tokens trained on.
    lanes: number of data lanes, pinned for the run's life.
    cursors: lane to its data cursor (three integers), after ``step`` steps.
    loss_ema: EMA of the loss, not yet debiased.
    training_time: seconds of steps, the first 10 of the run left out.
    skipped: steps skipped for a loss or gradient that was not finite.
    minimum: smallest value seen of each evaluation metric.
    ledger_bytes: length of the ledger that belongs to this state.
    comparable_from: step from which on evaluations read the validation data of today.
    fingerprints: of the tokenizer and of both splits of the data (``tokenizer``, ``train``, ``val``).
    """

    step: int = 0
    tokens: int = 0
    lanes: int = 0
    cursors: dict[int, tuple[int, int, int]] = attrs.field(factory=dict)
    loss_ema: float = 0.0
    training_time: float = 0.0
    skipped: int = 0
    minimum: dict[str, float] = attrs.field(factory=dict)
    ledger_bytes: int = 0
    comparable_from: int = 0
    fingerprints: dict[str, str] = attrs.field(factory=dict)

    def smooth(self, loss: float) -> float:
        """Take in the loss of one more step; returns the debiased EMA. Call after ``step`` has been advanced."""
        self.loss_ema = EMA_DECAY * self.loss_ema + (1 - EMA_DECAY) * loss
        return self.loss_ema / (1 - EMA_DECAY ** (self.step - self.skipped))

    def note_minimum(self, metrics: Mapping[str, float | str]) -> None:
        """Keep the smallest value of each metric."""
        for name, value in metrics.items():
            if isinstance(value, float):
                self.minimum[name] = min(value, self.minimum.get(name, value))

    def to_json(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "cursors": {str(lane): list(c) for lane, c in sorted(self.cursors.items())}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainState:
        cursors = {int(lane): tuple(cursor) for lane, cursor in content["cursors"].items()}
        return cls(**{**content, "cursors": cursors})


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's random-number generators: uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
