"""Time two pieces of work in alternating turns, and print their ratio as a row of a table."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from utils import cpus
from utils.timing import rounds
from utils.timing.rounds import Turn

THREADS = cpus.default_threads()
WHAT, RATIO, GOAL = 88, 22, 7  # widths of the columns
HEAD = f"{'what':{WHAT}} {'ratio [95 % interval]':{RATIO}} {'goal':{GOAL}} met"


@dataclass(frozen=True)
class Settings:
    """The options of a benchmark."""

    folder: Path  # for temporary files
    data: Path | None  # folder of images; None for drawn images
    smoke: bool  # do as little work as possible
    init: str | None = None  # path of weights, with {model} in place of the model's name


@dataclass(frozen=True)
class Row:
    """A line of the table: a ratio with its interval, and its goal."""

    what: str
    ratio: float
    low: float | None  # None if there are too few launches for an interval
    high: float | None
    sign: str = ">="  # the ratio should be at least (>=) or at most (<=) the goal
    goal: float | None = None

    @property
    def met(self) -> str:
        """Whether the whole interval meets the goal: yes, no or unclear."""
        if self.low is None:
            return "unclear"
        if self.sign == ">=":
            reached = [self.low >= self.goal, self.high >= self.goal]
        else:
            reached = [self.low <= self.goal, self.high <= self.goal]
        if all(reached):
            return "yes"
        return "unclear" if any(reached) else "no"

    def __str__(self) -> str:
        ratio = f"{self.ratio:.2f}"
        if self.low is not None:
            ratio += f" [{self.low:.2f}, {self.high:.2f}]"
        if self.goal is None:
            return f"{self.what:{WHAT}} {ratio}"
        return f"{self.what:{WHAT}} {ratio:{RATIO}} {self.sign} {self.goal:<{GOAL - 3}g} {self.met}"


def turn(work: Callable[[], object], times: int = 1) -> Turn:
    """Make a turn that repeats `work` a number of `times`."""
    return lambda: [seconds(work) for _ in range(times)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def faster(what: str, ours: Turn, other: Turn, goal: float, count: int) -> Row:
    """Make the row for the time of `other` over our time, which should be at least `goal`."""
    return _row(what, other, ours, ">=", goal, count)


def cost(what: str, ours: Turn, other: Turn, goal: float, count: int) -> Row:
    """Make the row for our time over the time of `other`, which should be at most `goal`."""
    return _row(what, ours, other, "<=", goal, count)


def _row(what: str, above: Turn, below: Turn, sign: str, goal: float, count: int) -> Row:
    kept = rounds.alternate([above, below], count).quiet
    ratios = np.array([np.median(first) / np.median(second) for first, second in kept])
    return Row(what, float(np.median(ratios)), *interval(ratios), sign, goal)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median of `ratios` (n,), with a fixed seed.

    The ratios are of rounds in this process, and the interval covers rounds, not launches.
    """
    if np.ptp(ratios) == 0:
        return float(ratios[0]), float(ratios[0])
    how = dict(method="percentile", rng=np.random.default_rng(0), n_resamples=2000)
    low, high = stats.bootstrap((ratios,), np.median, **how).confidence_interval
    return float(low), float(high)
