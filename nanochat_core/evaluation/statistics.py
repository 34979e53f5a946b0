"""Bootstrap intervals and tests of evaluation scores."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

DRAWS = 2000  # of a bootstrap


SEED = 1


Values = npt.NDArray[np.float64]


def bootstrap_means(values: Values, rng: np.random.Generator) -> Values:
    """Means of ``DRAWS`` samples with replacement."""
    if set(np.unique(values)) <= {0.0, 1.0}:  # then the number of ones in a sample is binomial
        return rng.binomial(len(values), values.mean(), DRAWS) / len(values)
    draws = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)]
    return np.array(draws)


def interval(means: Values) -> tuple[float, float]:
    """The middle 95%."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of so many wins and losses when both are equally likely; McNemar's for right and wrong."""
    n, few = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    log_p = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in log_p))


def scale_of(values: Values, centered: Values) -> float:
    """By how much centering, which is linear, stretches."""
    spread = float(values.max() - values.min())
    return float(centered.max() - centered.min()) / spread if spread else 0.0
