"""The learning-rate schedule, value by value."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.config.schema import Schedule
from nanochat_core.planning.schedule import lr_multiplier, phases


def values(schedule: Schedule, num_iterations: int) -> list[float]:
    return [lr_multiplier(schedule, step, num_iterations) for step in range(num_iterations)]


def test_classic_is_flat_and_then_falls() -> None:
    assert values(Schedule(warmdown_ratio=0.4), 10) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert lr_multiplier(Schedule(warmdown_ratio=0.4), 10, 10) == 0


def test_warmup_rises_to_one_without_a_step_at_zero() -> None:
    schedule = Schedule(warmup_steps=4, warmdown_ratio=0.0)
    assert values(schedule, 6) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert values(Schedule(warmup_ratio=0.4, warmdown_ratio=0.0), 10)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_the_floor() -> None:
    schedule = Schedule(warmdown_ratio=0.5, final_lr_frac=0.1)
    assert values(schedule, 4) == pytest.approx([1, 1, 1, 0.55])
    assert lr_multiplier(schedule, 4, 4) == pytest.approx(0.1)
    assert lr_multiplier(schedule, 5, 4) == pytest.approx(0.1)  # past the end


def test_speedrun_phases() -> None:
    schedule = Schedule(warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05)
    assert phases(schedule, 5568) == (40, 3619)
    assert lr_multiplier(schedule, 0, 5568) == pytest.approx(1 / 40)
    assert lr_multiplier(schedule, 5568 - 3619, 5568) == 1
    assert lr_multiplier(schedule, 5568, 5568) == pytest.approx(0.05)


def test_warmup_ratio_is_of_the_run() -> None:
    assert phases(Schedule(warmup_ratio=0.1, warmdown_ratio=0.2), 200) == (20, 40)
    assert phases(Schedule(), 200) == (0, 40)
    assert phases(Schedule(warmdown_ratio=0.0), 200) == (0, 0)


@given(
    st.integers(1, 60),
    st.integers(0, 20),
    st.floats(0, 1, allow_subnormal=False),
    st.floats(0, 1, allow_subnormal=False),
)
def test_always_between_zero_and_one_and_never_rises_after_the_warmup(
    num_iterations: int, warmup: int, warmdown_ratio: float, floor: float
) -> None:
    schedule = Schedule(warmup_steps=warmup, warmdown_ratio=warmdown_ratio, final_lr_frac=floor)
    found = values(schedule, num_iterations)
    assert all(0 <= value <= 1 for value in found)
    assert all(value > 0 for value in found)  # no step of a run is done for nothing
    after = found[warmup:]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(after))
