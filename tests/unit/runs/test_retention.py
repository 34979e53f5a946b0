"""Which checkpoints are kept, and how many there are at one time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.config.schema import Checkpoint
from nanochat_core.runs.retention import most_at_once, steps_to_delete


@pytest.mark.parametrize(
    ("options", "scores", "kept"),
    [
        ({}, {}, {10, 20, 30, 40, 50}),
        ({"keep_last": 2}, {}, {40, 50}),
        ({"keep_last": 9}, {}, {10, 20, 30, 40, 50}),
        ({"keep_every": 20}, {}, {20, 40, 50}),
        ({"keep_last": 2, "keep_every": 30}, {}, {30, 40, 50}),
        ({"keep_best": 1}, {10: 0.9, 20: 0.5, 30: 0.7}, {20, 50}),
        ({"keep_best": 2, "keep_last": 2}, {10: 0.9, 20: 0.5, 30: 0.7}, {20, 30, 40, 50}),
        ({"keep_best": 1, "best_is": "largest"}, {10: 0.9, 20: 0.5, 30: 0.7}, {10, 50}),
        ({"keep_best": 1}, {10: 0.5, 20: 0.5}, {10, 50}),
        ({"keep_best": 1}, {10: float("nan"), 20: float("inf"), 30: 3.0}, {30, 50}),
        ({"keep_best": 1}, {7: 0.1}, {10, 20, 30, 40, 50}),  # none of these was evaluated
    ],
)
def test_which_are_kept(options: dict[str, object], scores: dict[int, float], kept: set[int]) -> None:
    steps = [10, 30, 20, 50, 40]
    doomed = steps_to_delete(steps, scores, Checkpoint(**options))  # type: ignore[arg-type]
    assert set(steps) - set(doomed) == kept
    assert doomed == sorted(doomed)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 12),
        ({"keep_last": 1}, 2),
        ({"keep_last": 3}, 4),
        ({"keep_last": 99}, 12),
        ({"keep_every": 40}, 4),  # 40, 80, 110, 120
        ({"keep_last": 2, "keep_every": 50}, 4),  # 50, 100 and 110, 120
        ({"keep_best": 2}, 4),
        ({"keep_last": 2, "keep_every": 50, "keep_best": 3}, 7),
    ],
)
@pytest.mark.parametrize("end", [115, 120])
def test_how_many_there_are_at_one_time(options: dict[str, int], most: int, end: int) -> None:
    """Scores rise, so that the oldest are the best; but those that are kept anyway are worse."""
    steps, found, there = [*range(10, end, 10), end], 0, list[int]()
    asked = Checkpoint(save_every=10, **options)  # type: ignore[arg-type]
    scores = {step: step + 1000.0 * (step % (asked.keep_every or 1000) == 0) for step in steps}
    for step in steps:
        there.append(step)
        found = max(found, len(there))
        there = [each for each in there if each not in steps_to_delete(there, scores, asked)]
    assert most_at_once(len(steps), asked) == found == most


def test_step_0_is_not_one_of_every_so_many() -> None:
    """A signal before the first step saves it; training has nothing from it."""
    assert steps_to_delete([0, 20, 30], {}, Checkpoint(keep_every=20)) == [0]
    assert steps_to_delete([0], {}, Checkpoint(keep_every=20)) == []


def test_one_that_is_only_saved_at_the_end() -> None:
    assert most_at_once(1, Checkpoint(keep_last=2)) == most_at_once(1, Checkpoint(keep_every=7)) == 1


numbers = st.none() | st.integers(1, 6)


@given(
    st.sets(st.integers(0, 30)), st.dictionaries(st.integers(0, 30), st.floats()), numbers, numbers, numbers,
)  # fmt: skip
def test_the_newest_always_stays_and_nothing_is_made_up(
    steps: set[int], scores: dict[int, float], last: int | None, every: int | None, best: int | None
) -> None:
    options = Checkpoint(keep_last=last, keep_every=every, keep_best=best)
    doomed = set(steps_to_delete(steps, scores, options))
    assert doomed <= steps
    assert not steps or max(steps) not in doomed
    kept = steps - doomed
    assert len(kept) >= min(last or 0, len(steps))
    assert steps_to_delete(kept, scores, options) == []  # asked again, it wants nothing more


def test_keep_every_must_have_checkpoints() -> None:
    with pytest.raises(ValueError, match="keep_every must be a multiple of save_every, 100, not 250"):
        Checkpoint(save_every=100, keep_every=250)
