"""Bootstrap confidence intervals and significance tests of evaluation scores."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

DRAWS = 2000  # bootstrap samples
SEED = 1  # of the bootstrap

Values = npt.NDArray[np.float64]


def bootstrap_means(values: Values, rng: np.random.Generator) -> Values:
    """Return the means of ``DRAWS`` samples of ``values`` with replacement."""
    if set(np.unique(values)) <= {0.0, 1.0}:  # the number of ones in a sample is then binomial
        return rng.binomial(len(values), values.mean(), DRAWS) / len(values)
    draws = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)]
    return np.array(draws)


def interval(means: Values) -> tuple[float, float]:
    """Return the 2.5% and 97.5% percentiles of ``means``, the bounds of a 95% confidence interval."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of a sign test, which for right and wrong answers is McNemar's exact test."""
    n, few = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    log_p = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in log_p))


def scale_of(values: Values, centered: Values) -> float:
    """Return the factor by which centering, which is linear, scales values; 0 if all values are equal."""
    spread = float(values.max() - values.min())
    return float(centered.max() - centered.min()) / spread if spread else 0.0
