"""`utils.stats`: intervals against published ones, and how often they cover the truth."""

import numpy as np
import pytest

from utils import stats


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I,
        # method 3.
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
    assert stats.wilson(930, 1000) == pytest.approx(
        ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    )


@pytest.mark.parametrize(("q", "fewest"), [(90, 10), (95, 20), (99, 100)])
def test_percentile_needs_enough_values_to_be_more_than_the_largest(q, fewest):
    values = np.arange(fewest, dtype=float)
    assert stats.percentile(values[1:], q) is None
    assert stats.percentile(values, q) == np.percentile(values, q) < values.max()


def test_interval_by_hand():
    """Logarithms 0, 1, 2 and 3: mean 1.5, standard error sqrt(5/3 / 4), t 3.1824."""
    half = 3.182446 * np.sqrt(5 / 12)
    expected = np.exp(1.5 - half), np.exp(1.5 + half)
    assert stats.interval(np.exp([0, 1, 2, 3]), [0, 0, 0, 0]) == pytest.approx(expected, rel=1e-5)
    # Two sessions with the means 0.5 and 2.5: standard error 1, t 12.706.
    assert stats.interval(np.exp([0, 1, 2, 3]), [0, 0, 1, 1]) == pytest.approx(
        (np.exp(1.5 - 12.7062), np.exp(1.5 + 12.7062)), rel=1e-3
    )
    assert stats.grouped_mean(np.exp([0, 1, 5]), [0, 0, 1]) == pytest.approx(np.exp((0.5 + 5) / 2))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_three_launches_give_no_interval(count):
    assert stats.interval([1.0] * count, [0] * count) == (None, None)
    assert stats.interval([1.0] * 4, [0] * 4) == (1.0, 1.0)


def simulated_coverage(draw, groups, repeats=1000):
    """Share of intervals that contain the truth, 1, for values drawn by `draw(generator)`."""
    generator = np.random.default_rng(9)
    intervals = np.array([stats.interval(draw(generator), groups) for _ in range(repeats)])
    return ((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)).mean()


@pytest.mark.parametrize("launches", [4, 6, 10])
def test_the_interval_of_a_session_covers_the_mean_of_its_launches(launches):
    draw = lambda generator: np.exp(0.05 * generator.normal(size=launches))  # noqa: E731
    assert 0.93 <= simulated_coverage(draw, [0] * launches) <= 0.97


@pytest.mark.parametrize("sessions", [3, 4, 6])
def test_the_interval_of_sessions_covers_what_varies_by_the_day(sessions):
    """Days differ by 6 % and launches of a day by 2 %; one day covers less than half."""
    groups = np.repeat(np.arange(sessions), 6)

    def draw(generator):
        days = 0.06 * generator.normal(size=sessions)
        return np.exp(days[groups] + 0.02 * generator.normal(size=len(groups)))

    assert 0.93 <= simulated_coverage(draw, groups) <= 0.97
    assert simulated_coverage(draw, np.zeros(len(groups), int)) < 0.75
    one_day = lambda generator: draw(generator)[:6]  # noqa: E731
    assert simulated_coverage(one_day, [0] * 6) < 0.5


def test_crossed_interval_by_hand():
    """Two seeds, four images and the two additional ones, 0.375 + and - 0.7071.

    Mean squares: seeds 6 (2 x 0.08333^2) = 0.08333, images 0.675, the rest 0.08333. With t = 12.706
    for two seeds and z = 1.960, the square of half the interval is
    (161.45 x 0.08333 + 3.8415 x 0.59167) / 12 = 1.3106.
    """
    low, high = stats.crossed_interval(np.array([[1, 1, 0, 0], [1, 0, 0, 0]], float))
    assert (low, high) == pytest.approx((0.375 - 1.3106**0.5, 0.375 + 1.3106**0.5), abs=1e-4)


def test_crossed_interval_of_no_difference_is_that_of_one_pair():
    crossed = stats.crossed_interval(np.zeros((3, 2000)))
    single = stats.paired_difference(0, 0, 2000)
    assert crossed == pytest.approx(single, abs=5e-5)


@pytest.mark.parametrize("spread", [0, 0.2])
def test_crossed_interval_covers_the_truth_for_other_seeds_and_images(spread):
    """Three networks, some better than others, decide 300 images, some harder than others."""
    generator, inside = np.random.default_rng(3), []
    for _ in range(400):
        skill, ease = spread * generator.normal(size=(3, 1)), generator.normal(size=300)
        right = skill + ease + generator.normal(size=(3, 300)) > 0
        low, high = stats.crossed_interval(right.astype(float))
        inside.append(low <= 0.5 <= high)  # all three are symmetric around 0
    assert 0.93 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize(
    ("n", "percentile", "rank"),
    [
        (63, 0.90, None),
        (64, 0.90, 1),  # 0.9^64 + 64 0.1 0.9^63 = 0.0096, the first below 0.01
        (661, 0.99, None),
        (662, 0.99, 1),
        (1000, 0.90, 78),  # P(Binomial(1000, 0.1) <= 78) = 0.0099, <= 79: 0.0133
    ],
)
def test_percentile_bound_is_the_rank_that_is_safe_to_discard(n, percentile, rank):
    latencies = np.random.default_rng(10).permutation(np.arange(n, dtype=float))
    assert stats.percentile_bound(latencies, percentile) == (None if rank is None else n - rank)


def test_percentile_bound_is_below_the_percentile_at_most_one_time_in_100():
    generator = np.random.default_rng(11)
    bounds = [stats.percentile_bound(generator.exponential(size=300), 0.9) for _ in range(1000)]
    assert np.mean(np.array(bounds) < np.log(10)) <= 0.01 + 0.01


def test_fewest_queries_are_mlperfs():
    assert (stats.fewest_queries(0.90), stats.fewest_queries(0.99)) == (64, 662)


@pytest.mark.parametrize(
    ("successes", "n", "other", "other_n", "low", "high"),
    [
        # Newcombe 1998, "Interval estimation for the difference between independent proportions",
        # table II, method 10.
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (10, 10, 0, 20, 0.6791, 1.0000),
    ],
)
def test_newcombe_intervals_as_published(successes, n, other, other_n, low, high):
    assert stats.newcombe(successes, n, other, other_n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (1, 7, 2 * (1 + 8) / 2**8),
        (0, 5, 2 / 2**5),
        (4, 4, 1.0),
        (0, 0, 1.0),
        # Agresti's approval ratings, exact: Fay 2010, vignette of the R package exact2x2.
        (86, 150, 3.716e-5),
    ],
)
def test_mcnemar_counted_by_hand_and_as_published(gained, lost, p):
    assert stats.mcnemar(gained, lost) == pytest.approx(p, rel=1e-3)
    assert stats.mcnemar(lost, gained) == stats.mcnemar(gained, lost)


def simulated_pairs(gain: float, loss: float, n: int, repeats: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(n, [gain, loss, 1 - gain - loss], repeats)[:, :2]


def test_mcnemar_rejects_equal_classifiers_at_most_as_often_as_it_says():
    rejected = [stats.mcnemar(*pair) < 0.05 for pair in simulated_pairs(0.01, 0.01, 2000, 1000, 4)]
    # Exact tests are conservative; the upper bound is three standard errors above the level.
    assert 0.01 < np.mean(rejected) < 0.05 + 0.02


@pytest.mark.parametrize(("gain", "loss"), [(0.01, 0.01), (0.002, 0.02), (0.05, 0.01)])
def test_paired_difference_covers_the_true_difference_about_95_times_in_100(gain, loss):
    pairs = simulated_pairs(gain, loss, 2000, 400, 5)
    intervals = np.array([stats.paired_difference(*pair, 2000) for pair in pairs])
    # Both ends and the truth are multiples of 1/2000.
    low, high = intervals.T + np.array([[-1e-12], [1e-12]])
    assert 0.925 <= ((low <= gain - loss) & (gain - loss <= high)).mean() <= 0.985


def test_paired_difference_is_that_of_resampling_the_images_themselves():
    change = np.repeat([1, -1, 0], [12, 30, 1958])
    generator = np.random.default_rng(6)
    resampled = [generator.choice(change, 2000).mean() for _ in range(4000)]
    assert stats.paired_difference(12, 30, 2000) == pytest.approx(
        np.quantile(resampled, [0.025, 0.975]), abs=7e-4
    )


def test_paired_difference_does_not_close_on_zero_where_nothing_differs():
    low, high = stats.paired_difference(0, 0, 2000)
    assert -0.002 < low <= 0 <= high < 0.002


def test_holm_by_hand():
    assert stats.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert stats.holm(np.array([0.6, 0.7])) == pytest.approx([1.0, 1.0])
    assert stats.holm(np.array([])).shape == (0,)


def test_holm_finds_something_in_nothing_at_most_5_times_in_100():
    uniform = np.random.default_rng(7).random((2000, 12))
    assert np.mean([stats.holm(row).min() < 0.05 for row in uniform]) == pytest.approx(
        0.05, abs=0.015
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.004, 0.001, "held"),
        (0.001, 0.01, "held"),
        (-0.006, 0.001, "undecided"),
        (-0.005, 0.0, "undecided"),
        (-0.02, -0.006, "lost"),
    ],
)
def test_verdict_by_where_the_margin_lies(low, high, said):
    assert stats.verdict(low, high) == said


def test_verdict_held_is_wrong_at_most_as_often_as_the_interval_allows():
    # Worse by exactly the margin, so "held" would be wrong.
    pairs = simulated_pairs(0.005, 0.01, 2000, 500, 8)
    held = [stats.verdict(*stats.paired_difference(*pair, 2000)) == "held" for pair in pairs]
    assert np.mean(held) < 0.025 + 0.025


def test_against_counts_images():
    right = np.array([1, 1, 0, 0, 1, 1, 1, 1, 1, 1], bool)
    baseline = np.array([1, 0, 1, 1, 1, 1, 1, 1, 1, 1], bool)
    judged = stats.against(right, baseline)
    assert (judged["gained"], judged["lost"], judged["accuracy_difference"]) == (1, 2, -0.1)
    assert judged["mcnemar_p"] == 1.0
    assert judged["accuracy_difference_ci_low"] < -0.1 < judged["accuracy_difference_ci_high"]
