"""The learning-rate schedule: pure functions of the step."""

from __future__ import annotations

from nanochat_core.config.schema import Schedule


def phases(schedule: Schedule, num_iterations: int) -> tuple[int, int]:
    """Return the number of warmup steps and of warmdown steps of a run."""
    if schedule.warmup_steps is not None:
        warmup = schedule.warmup_steps
    else:
        warmup = round((schedule.warmup_ratio or 0.0) * num_iterations)
    return warmup, round(schedule.warmdown_ratio * num_iterations)


def lr_multiplier(schedule: Schedule, step: int, num_iterations: int) -> float:
    """Return the factor on every learning rate for the update after ``step`` updates: linear up, flat, linear down."""
    warmup, warmdown = phases(schedule, num_iterations)
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_iterations - warmdown:
        return 1.0
    left = max(num_iterations - step, 0) / warmdown
    return left + (1.0 - left) * schedule.final_lr_frac


def warmdown_progress(schedule: Schedule, step: int, num_iterations: int) -> float:
    """Return the progress of the warmdown at the update after ``step`` updates: 0 before it, 1 at its end."""
    _, warmdown = phases(schedule, num_iterations)
    return min(max(step - (num_iterations - warmdown), 0) / warmdown, 1.0) if warmdown else 0.0
