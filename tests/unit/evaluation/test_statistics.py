"""Means and tests of an evaluation's values."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_core.evaluation.statistics import bootstrap_means, interval, sign_test


def test_bootstrap_of_any_values() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 1.0, 400)
    means = bootstrap_means(values, rng)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.1)


def test_interval_leaves_five_percent_out() -> None:
    low, high = interval(np.arange(1001.0))
    assert (low, high) == (pytest.approx(25, abs=1), pytest.approx(975, abs=1))


def test_sign_test() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 3) == 1.0
    assert sign_test(10, 0) == pytest.approx(2 / 2**10)
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
