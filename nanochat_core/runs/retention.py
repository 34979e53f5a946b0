"""The choice of the checkpoints that are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from nanochat_core.config.schema import Checkpoint


def steps_to_delete(steps: Iterable[int], scores: Mapping[int, float], options: Checkpoint) -> list[int]:
    """Steps of checkpoints that ``options`` does not keep, oldest first.

    The newest is always kept. ``keep_every`` does not keep step 0, which a signal before the first step saves.
    ``keep_best`` compares those that have a score; of equal ones the older is better.
    While none has a score, nothing is deleted, because any might turn out best.

    Args:
        steps: steps of the existing checkpoints.
        scores: value of ``options.best_metric`` by step.
    """
    newest_first = sorted(steps, reverse=True)
    if options.keep_last is options.keep_every is options.keep_best is None:
        return []
    keep = set(newest_first[: options.keep_last or 1])
    if options.keep_every is not None:
        keep |= {step for step in newest_first if step > 0 and step % options.keep_every == 0}
    if options.keep_best is not None:
        sign = -1 if options.best_is == "largest" else 1
        scored = [step for step in newest_first if math.isfinite(scores.get(step, math.nan))]
        if not scored:
            return []
        keep.update(sorted(scored, key=lambda step: (sign * scores[step], step))[: options.keep_best])
    return [step for step in reversed(newest_first) if step not in keep]


def most_at_once(count: int, options: Checkpoint) -> int:
    """Largest number of a run's ``count`` checkpoints that are on disk at the same time: those kept before the last,
    and the last, which is written before any is deleted. Checkpoints that ``keep_best`` keeps are counted as
    additional.
    """
    before = count - 1
    if options.keep_last is options.keep_every is options.keep_best is None:
        return count
    last = min(options.keep_last or 1, before)
    every = (options.save_every or 0) * (before - last) // options.keep_every if options.keep_every else 0
    return 1 + min(last + every + (options.keep_best or 0), before)
