"""Comparison of two evaluations, example by example."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

from nanochat_core.evaluation.results import Stored
from nanochat_core.evaluation.statistics import DRAWS, SEED, Values, interval, scale_of, sign_test


@attrs.frozen
class Difference:
    """The difference of evaluation B from evaluation A on the examples of a task that both have.

    Args:
        n: number of those examples.
        a, b: scores of the two evaluations.
        low, high: 95% confidence interval of ``b - a``, from a paired bootstrap.
        wins, losses: numbers of examples with a higher and with a lower value in B.
        p: p-value of a sign test; NaN for the mean over tasks.
    """

    task: str
    n: int
    a: float
    b: float
    low: float
    high: float
    wins: int
    losses: int
    p: float


def other_data(a: Stored, b: Stored) -> list[str]:
    """Return the splits that both evaluations read from different data, so that their scores are not comparable."""
    ours, theirs = (stored.facts.get("data", {}) for stored in (a, b))
    return sorted(split for split in ours.keys() & theirs.keys() if ours[split] != theirs[split])


def compare(a: Stored, b: Stored) -> list[Difference]:
    """Return the difference in each task that both evaluations have, and last that of the mean of centered scores."""
    rng = np.random.default_rng(SEED)
    differences = []
    total: Values = np.zeros(DRAWS)
    means = []
    for task in a.values:
        keys = [key for key in a.values[task] if key in b.values.get(task, {})]
        if not keys:
            continue
        ours, theirs = (np.array([side.values[task][key] for key in keys]) for side in (a, b))
        centers = [np.array([side.centered[task][key] for key in keys]) for side in (a, b)]
        change = theirs - ours
        # A bootstrap sample draws examples, each with its pair of values.
        kinds, counts = np.unique(change, return_counts=True)
        if len(kinds) <= 64:
            draws = rng.multinomial(len(keys), counts / len(keys), DRAWS) @ kinds / len(keys)
        else:
            draws = np.array([change[rng.integers(0, len(keys), len(keys))].mean() for _ in range(DRAWS)])
        scale = scale_of(np.concatenate([ours, theirs]), np.concatenate(centers))
        total += draws * scale
        means.append((float(centers[0].mean()), float(centers[1].mean())))
        wins, losses = int((change > 0).sum()), int((change < 0).sum())
        p = sign_test(wins, losses)
        low, high = interval(draws)
        a_mean, b_mean = float(ours.mean()), float(theirs.mean())
        differences.append(Difference(task, len(keys), a_mean, b_mean, low, high, wins, losses, p))
    if differences:
        low, high = interval(total / len(means))
        before, after = (sum(side) / len(means) for side in zip(*means, strict=True))
        wins, losses = sum(d.wins for d in differences), sum(d.losses for d in differences)
        n = sum(d.n for d in differences)
        differences.append(Difference("mean, centered", n, before, after, low, high, wins, losses, math.nan))
    return differences


def format_comparison(differences: Sequence[Difference]) -> str:
    """Format differences as a Markdown table."""
    lines = [
        "| task | examples | A | B | B - A | 95% | better | worse | p |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for d in differences:
        p = "" if math.isnan(d.p) else f"{d.p:.3g}"
        lines.append(
            f"| {d.task} | {d.n} | {d.a:.4f} | {d.b:.4f} | {d.b - d.a:+.4f} | {d.low:+.4f} to {d.high:+.4f} "
            f"| {d.wins} | {d.losses} | {p} |"
        )
    return "\n".join(lines)
