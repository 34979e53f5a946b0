"""The ledger row of a step, and what people are told of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nanochat_core.planning.plan import Plan
from nanochat_core.runs.state import TrainState
from nanochat_core.training.metrics import Measured, StepTimer, step_row
from nanochat_core.training.step import StepOutcome

MEASURED = Measured(seconds=0.5, data_wait=0.1, lr_multiplier=0.75, peak_flops=1e6, peak_memory=12.5)


def plan(**more: Any) -> Plan:
    """A plan of two ranks, of whose numbers only those of the FLOPs matter here."""
    numbers = dict.fromkeys(
        ("vocab_size", "max_seq_len", "device_batch_size", "total_batch_size", "rows_per_step", "accumulation_steps",
         "num_iterations", "warmup_steps", "warmdown_steps", "scaling_parameters", "room", "checkpoint_bytes",
         "checkpoints"), 1,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "world_size": 2, "device": "CPU", "dtype": "float32", "compile": False, "horizon": "", "relative_data": None,
        "parameter_counts": {}, "flops_per_token": 200.0, "activation_checkpointing": False, "memory": {},
        "choices": {}, "description": {},
    }  # fmt: skip
    return Plan(**{**numbers, **facts, **more})


def outcome(loss: float = 2.0, **more: Any) -> StepOutcome:
    return StepOutcome(**{"loss": loss, "grad_norm": 0.5, "tokens": 100, "epoch": 0.25, "finite": True, **more})


def test_a_row_has_every_metric_of_a_step() -> None:
    state = TrainState(step=1, tokens=300, training_time=7.0)
    row = step_row(outcome(), state, plan(), MEASURED, crops=False)
    assert row.values == {
        "train/loss": 2.0,
        "train/loss_ema": pytest.approx(2.0),
        "train/grad_norm": 0.5,
        "train/lrm": 0.75,
        "train/dt": 0.5,
        "train/tok_per_sec": 200.0,
        "train/mfu": pytest.approx(100 * 200 * 200 / 2e6),  # FLOPs per second of what two devices can do
        "train/epoch": 0.25,
        "train/data_wait": 0.1,
        "train/peak_memory": 12.5,
        "total_training_flops": 200.0 * 300,
        "total_training_time": 7.0,
    }
    assert row.remarks == []


def test_the_average_follows_the_losses() -> None:
    state, averages = TrainState(), list[float]()
    for loss in (4.0, 2.0, 2.0):
        state.step += 1
        averages.append(float(step_row(outcome(loss), state, plan(), MEASURED, crops=False).values["train/loss_ema"]))
    assert averages == pytest.approx([4.0, (0.9 * 4 + 2) / 1.9, (0.81 * 4 + 0.9 * 2 + 2) / 2.71])


def test_a_spike_is_told_with_its_step() -> None:
    state = TrainState()
    for step in range(100):
        state.step += 1
        quiet = step_row(outcome(2.0 + 0.01 * (-1) ** step), state, plan(), MEASURED, crops=False)
        assert "train/loss_spike" not in quiet.values
    state.step += 1
    row = step_row(outcome(9.0, grad_norm=12.5), state, plan(), MEASURED, crops=False)
    (line,) = row.remarks
    assert line.startswith("step 100: the loss spikes: 9.0000, ")
    assert line.endswith("(gradient norm 12.5)")
    assert float(row.values["train/loss_spike"]) > 100


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_skipped_step_leaves_the_average_alone(loss: float) -> None:
    state = TrainState(step=5, skipped=1, loss_ema=1.5)
    row = step_row(outcome(loss, finite=False), state, plan(), MEASURED, crops=False)
    assert row.values["train/skipped"] == 1
    assert "train/loss_ema" not in row.values
    assert state.loss_ema == 1.5
    assert row.remarks == [f"step 4: loss {loss}, gradient norm 0.5: not finite, the update is skipped"]


def test_float16_has_a_loss_scale() -> None:
    state = TrainState(step=1, loss_scale=64.0)
    assert step_row(outcome(), state, plan(dtype="float16"), MEASURED, crops=False).values["train/loss_scale"] == 64.0


def test_packing_that_crops_is_told() -> None:
    row = step_row(outcome(lost_tokens=25.0), TrainState(step=1), plan(), MEASURED, crops=True)
    assert row.values["train/cropped"] == 25 / 125


def test_the_timer_counts_waiting_as_a_part() -> None:
    timer = StepTimer(started=0.0)
    with timer.waiting_for_data():
        pass
    assert 0 <= timer.data_wait < 60
    assert timer.seconds() > timer.data_wait
