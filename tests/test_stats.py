"""`utils.stats`: intervals against published ones, and how often they cover the truth."""

import numpy as np
import pytest

from utils import stats


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_as_published(successes, n, low, high):
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_within_zero_and_one():
    low, high = stats.wilson(1, 29)
    assert stats.wilson(28, 29) == pytest.approx((1 - high, 1 - low))
    assert stats.wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_wilson_by_its_formula():
    p, n, z = 0.93, 1000, 1.959963984540054
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert stats.wilson(930, 1000) == pytest.approx(((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)))


def test_median_interval_covers_the_true_median_about_95_times_in_100():
    generator = np.random.default_rng(1)
    repeats, truth = 300, np.log(2)  # the median of the exponential distribution
    intervals = np.array([stats.median_interval(generator.exponential(size=25)) for _ in range(repeats)])
    covered = ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
    assert 0.91 <= covered <= 0.985  # within three standard errors, and a little below 0.95 as it is for small samples


def test_median_interval_holds_the_median_and_narrows():
    values = np.random.default_rng(2).normal(5, 1, 400)
    low, high = stats.median_interval(values)
    assert low < np.median(values) < high
    few = stats.median_interval(values[:25])
    assert 2 < (few[1] - few[0]) / (high - low) < 8  # by about four, the root of 16


def test_median_interval_is_the_same_each_time_and_follows_the_unit():
    values = np.random.default_rng(3).exponential(size=30)
    assert stats.median_interval(values) == stats.median_interval(values.copy())
    assert stats.median_interval(1000 * values) == pytest.approx(tuple(1000 * end for end in stats.median_interval(values)))


def test_one_value_is_its_own_interval():
    assert stats.median_interval(np.array([3.5])) == (3.5, 3.5)
