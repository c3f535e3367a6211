"""Intervals, tests and verdicts for measured differences.

scipy computes the statistics; this module makes the choices.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
CONFIDENCE_RISK = 0.01  # probability that a percentile exceeds its bound, as in MLPerf
# Accuracy that a network may lose and still count as held; declared before the reported runs.
MARGIN = 0.005
FEWEST_LAUNCHES = 4  # for an interval over launches


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a share, at `LEVEL` (Wilson 1927; scipy.stats.binomtest)."""
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe(successes: int, n: int, other_successes: int, other_n: int) -> tuple[float, float]:
    """Interval of the difference of two independent shares, at `LEVEL`.

    The difference is successes / n - other_successes / other_n. The interval combines two Wilson
    intervals: method 10 of Newcombe 1998, "Interval estimation for the difference between
    independent proportions".
    """
    first = (successes / n, *wilson(successes, n))
    second = (other_successes / other_n, *wilson(other_successes, other_n))
    return difference(first, second)


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Interval of the difference of two independent estimates, each (value, low, high).

    It has the level of the two intervals. This is MOVER, the method of variance estimates recovery:
    Zou and Donner 2008, "Construction of confidence limits about effect measures: a general
    approach".
    """
    value, low, high = first
    other, other_low, other_high = second
    below = np.hypot(value - low, other_high - other)
    above = np.hypot(high - value, other - other_low)
    return float(value - other - below), float(value - other + above)


def interval(
    values: Sequence[float], groups: Sequence[int]
) -> tuple[float, float] | tuple[None, None]:
    """Interval at `LEVEL` of the mean of positive `values` (n,), such as ratios of times.

    `groups` (n,) has the session of each value, a launch. With several sessions, their means are
    the sample, since launches of a session share what changes between days. With one session, its
    launches are, and the interval covers them only; fewer than `FEWEST_LAUNCHES` give (None, None).
    Student's t on the logarithms: simulated from the launches of 346 rows of this study, it covers
    the truth in 94 to 95 of 100 cases with 4 to 10 launches. The range of three covered 75.
    """
    by_group = _by_group(np.log(values), groups)
    sample = np.array([group.mean() for group in by_group]) if len(by_group) > 1 else by_group[0]
    if len(by_group) == 1 and len(sample) < FEWEST_LAUNCHES:
        return None, None
    half = stats.t.ppf((1 + LEVEL) / 2, len(sample) - 1) * stats.sem(sample)
    return float(np.exp(sample.mean() - half)), float(np.exp(sample.mean() + half))


def grouped_mean(values: Sequence[float], groups: Sequence[int]) -> float:
    """Geometric mean over groups of the geometric mean in each: the middle of `interval`."""
    return float(np.exp(np.mean([group.mean() for group in _by_group(np.log(values), groups)])))


def _by_group(values: np.ndarray, groups: Sequence[int]) -> list[np.ndarray]:
    groups = np.asarray(groups)
    return [values[groups == group] for group in np.unique(groups)]


def crossed_interval(values: np.ndarray) -> tuple[float, float]:
    """Interval of the mean of `values` (seeds, images) for other seeds and images, at `LEVEL`.

    All networks answer the same images, so seeds and images are crossed random effects. The method
    is a two-way analysis of variance without replication. (For shares of correct answers: Gallas et
    al. 2007, "Multireader multicase variance analysis for binary data", with seeds as readers.) The
    few seeds get Student's t and the many images the normal distribution; the squares of both parts
    add up, as in MOVER (see `difference`). With three seeds, this covers the truth in 94 to 98 of
    100 simulated studies; with joint degrees of freedom for both parts (Hillis 2007) it was 91 to
    95.

    Two additional images, sqrt(1/2) above and below the mean, keep the interval from shrinking to 0
    if nothing differs, as in `paired_difference`.
    """
    mean = values.mean()
    more = mean + np.sqrt(0.5) * np.array([1, -1])
    values = np.hstack([values, np.tile(more, (len(values), 1))])
    seeds, images = values.shape
    of_seeds, of_images = values.mean(1) - mean, values.mean(0) - mean
    between_seeds = images * (of_seeds**2).sum() / (seeds - 1)
    between_images = seeds * (of_images**2).sum() / (images - 1)
    residual = values - mean - of_seeds[:, None] - of_images
    rest = (residual**2).sum() / ((seeds - 1) * (images - 1))
    t, z = stats.t.ppf((1 + LEVEL) / 2, seeds - 1), stats.norm.ppf((1 + LEVEL) / 2)
    half = np.sqrt((t**2 * between_seeds + z**2 * max(between_images - rest, 0)) / values.size)
    return float(mean - half), float(mean + half)


def percentile(values: np.ndarray, q: int) -> float | None:
    """Percentile `q` of `values` (n,); None if there are too few values.

    With fewer than 100 / (100 - q) values it would be the maximum. So a p90 needs 10 values, a p95
    20 and a p99 100.
    """
    if len(values) * (100 - q) < 100:
        return None
    return float(np.percentile(values, q))


def percentile_bound(latencies: np.ndarray, percentile: float) -> float | None:
    """Upper bound, with 99 % confidence, of a percentile of `latencies` (n,).

    `percentile` is from 0 to 1. The bound is the early-stopping estimate of MLPerf's LoadGen
    (mlcommons/inference, loadgen/results.cc) at tolerance 0: the t-th highest latency. t is the
    largest number for which the probability that at most t of n queries are slower than the true
    percentile is at most 1 %. A p90 needs 64 queries and a p99 needs 662; with fewer, the bound is
    None.
    """
    n = len(latencies)
    counts = np.arange(1, n + 1)
    safe = stats.binom.cdf(counts, n, 1 - percentile) <= CONFIDENCE_RISK
    discarded = int(counts[safe].max(initial=0))
    return float(np.sort(latencies)[n - discarded]) if discarded else None


def fewest_queries(percentile: float) -> int:
    """Smallest number of latencies for which `percentile_bound` gives a bound."""
    n = np.arange(2, 10_000)
    return int(n[stats.binom.cdf(1, n, 1 - percentile) <= CONFIDENCE_RISK].min())


def mcnemar(gained: int, lost: int) -> float:
    """p-value of the two-sided exact McNemar test of two classifiers on the same images.

    Only the candidate is right on `gained` images, and only the baseline on `lost` images. If both
    are 0, the p-value is 1.0. McNemar 1947, with the binomial distribution, not its approximation.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_difference(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Paired bootstrap interval of the difference of two accuracies, at `LEVEL`.

    Both are measured on the same `n` images; `gained` and `lost` are as in `mcnemar`. Resampling
    the images means drawing the numbers of gained, lost and other images from a multinomial. Half
    an additional image in each cell of the 2x2 table keeps the interval from shrinking to 0 if the
    two never differ (Agresti and Min 2005, "Simple improved confidence intervals for comparing
    matched proportions").
    """
    shares = np.array([gained + 0.5, lost + 0.5, n - gained - lost + 1]) / (n + 2)
    drawn = np.random.default_rng(0).multinomial(n, shares, 10 * RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def image_interval(values: np.ndarray) -> tuple[float, float]:
    """Normal interval, at `LEVEL`, of the mean of `values` (n,), one per image.

    Two additional images, sqrt(1/2) above and below the mean, keep it from shrinking to 0 if no
    image differs, as in `crossed_interval`.
    """
    mean = values.mean()
    more = np.append(values, mean + np.sqrt(0.5) * np.array([1, -1]))
    half = stats.norm.ppf((1 + LEVEL) / 2) * stats.sem(more)
    return float(mean - half), float(mean + half)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust p-values (n,) for n tests by Holm's step-down method (Holm 1979).

    An adjusted value below 0.05 is significant among all n.
    """
    order = np.argsort(p_values)
    tests_left = len(order) - np.arange(len(order))
    stepped = np.maximum.accumulate(np.asarray(p_values)[order] * tests_left)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """Judge non-inferiority to FP32 from the interval of the accuracy difference.

    "held": not worse by more than `margin`. "lost": worse by more. "undecided": the interval
    contains -margin. (Piaggio et al. 2012, JAMA 308:2594, figure 1.)
    """
    if low > -margin:
        return "held"
    return "lost" if high < -margin else "undecided"


def against(right: np.ndarray, baseline_right: np.ndarray) -> dict:
    """Compare a candidate's decisions with the baseline's on the same images.

    `right` and `baseline_right`, bool (n,), mark the images that each classifies correctly. Returns
    columns of results.csv.
    """
    gained, lost = int((right & ~baseline_right).sum()), int((~right & baseline_right).sum())
    low, high = paired_difference(gained, lost, len(right))
    return {
        "accuracy_difference": (gained - lost) / len(right),
        "accuracy_difference_ci_low": low,
        "accuracy_difference_ci_high": high,
        "gained": gained,
        "lost": lost,
        "flip_rate": (gained + lost) / len(right),
        "mcnemar_p": mcnemar(gained, lost),
        "margin": MARGIN,
        "verdict": verdict(low, high),
    }
