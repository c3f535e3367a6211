"""What a measured difference is worth: intervals, tests, verdicts. scipy does the statistics, this module fixes the choices."""

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
CONFIDENCE_RISK = 0.01  # of a percentile's bound, as MLPerf has it
MARGIN = 0.005  # of accuracy, declared before anything was measured: what quantization may lose and still count as held


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a share, at `LEVEL` (Wilson 1927; scipy.stats.binomtest)."""
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe(successes: int, n: int, other_successes: int, other_n: int) -> tuple[float, float]:
    """Interval of the difference of two independent shares, successes / n - other_successes / other_n, at `LEVEL`.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10, of Wilson intervals.
    """
    first, second = successes / n, other_successes / other_n
    (low, high), (other_low, other_high) = wilson(successes, n), wilson(other_successes, other_n)
    below = np.hypot(first - low, other_high - second)
    above = np.hypot(high - first, second - other_low)
    return float(first - second - below), float(first - second + above)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of `values` (n,), at `LEVEL`, resampled from a fixed seed."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    generator = np.random.default_rng(0)
    resampled = np.median(generator.choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Expanded percentile bootstrap interval of the mean of a few `values` (n,), at `LEVEL`, resampled from a fixed seed.

    The plain percentile interval is too narrow for small n, where it takes no account of the spread being estimated; the levels
    are moved out by as much as Student's t would (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 4.6).
    """
    n = len(values)
    if n < 2:
        return float(values[0]), float(values[0])
    tail = stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf((1 + LEVEL) / 2, n - 1))
    resampled = np.random.default_rng(0).choice(values, (5 * RESAMPLES, n)).mean(1)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def percentile_bound(latencies: np.ndarray, percentile: float) -> float | None:
    """What a percentile of the latencies (n,) is at most, with 99 % confidence; None where n is too small to tell.

    The early-stopping estimate of MLPerf's LoadGen (mlcommons/inference, loadgen/results.cc), at tolerance 0: the t-th highest
    latency, with the largest t for which so few of n queries would be slower than the true percentile with a probability of at
    most 1 %. It needs 64 queries for a p90 and 662 for a p99.
    """
    n = len(latencies)
    counts = np.arange(1, n + 1)
    allowed = int(counts[stats.binom.cdf(counts, n, 1 - percentile) <= CONFIDENCE_RISK].max(initial=0))
    return float(np.sort(latencies)[n - allowed]) if allowed else None


def fewest_queries(percentile: float) -> int:
    """How many latencies `percentile_bound` needs."""
    n = np.arange(2, 10_000)
    return int(n[stats.binom.cdf(1, n, 1 - percentile) <= CONFIDENCE_RISK].min())


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test of two classifiers on the same images (McNemar 1947; binomial, not its approximation).

    `gained` images are right only with the candidate, `lost` only with the baseline; 1.0 when there are none of either.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_difference(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Paired bootstrap interval of the difference of two accuracies on the same `n` images, at `LEVEL`.

    Resampling images is drawing how many of them the candidate gains, loses and neither: a multinomial. Half an image more in
    each cell of the 2x2 table keeps the interval from closing on 0 where the two never differed (Agresti and Min 2005,
    "Simple improved confidence intervals for comparing matched proportions").
    """
    shares = np.array([gained + 0.5, lost + 0.5, n - gained - lost + 1]) / (n + 2)
    drawn = np.random.default_rng(0).multinomial(n, shares, 10 * RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values (n,) adjusted for having made n tests (Holm 1979, step-down): below 0.05 means significant among all of them."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(np.asarray(p_values)[order] * (len(order) - np.arange(len(order))))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """Non-inferiority of an accuracy, from the interval of its difference to the baseline's.

    "held": not worse by more than `margin`; "lost": worse by more; "undecided": the interval contains -margin. (Piaggio et al.
    2012, JAMA 308:2594, figure 1.)
    """
    return "held" if low > -margin else "lost" if high < -margin else "undecided"


def against(right: np.ndarray, baseline_right: np.ndarray) -> dict:
    """How a candidate's decisions compare with the baseline's, from which of the same images each gets right, bool (n,)."""
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
