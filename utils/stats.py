"""Intervals for what was measured. scipy does the statistics, this module fixes the choices."""

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a share, at `LEVEL` (Wilson 1927; scipy.stats.binomtest)."""
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of `values` (n,), at `LEVEL`, resampled from a fixed seed."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    generator = np.random.default_rng(0)
    resampled = np.median(generator.choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
