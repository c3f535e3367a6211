"""Time two pieces of work in alternating turns, and show their ratio as a row of the table."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from utils import cli
from utils.timing import rounds

THREADS = cli.cpu_count()
WHAT, RATIO, GOAL = 88, 22, 7  # widths of the columns
HEAD = f"{'what':{WHAT}} {'ratio [95 % interval]':{RATIO}} {'goal':{GOAL}} met"

Turn = Callable[[], list[float]]  # does a side's work at least once; returns seconds for each time


@dataclass(frozen=True)
class Settings:
    """Resources of a benchmark.

    `folder` is for its files. `data` has the images to use, or is None for drawn ones. `smoke` asks
    for the least possible work. `init` is the path of weights, with {model} for the model.
    """

    folder: Path
    data: Path | None
    smoke: bool
    init: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `sign` says whether the ratio should be at least (">=") or at most ("<=") `goal`, if there is one.
    """

    what: str
    ratio: float
    low: float
    high: float
    sign: str = ">="
    goal: float | None = None

    @property
    def met(self) -> str:
        """Whether the whole interval meets the goal: yes, no or unclear."""
        reached = [
            value >= self.goal if self.sign == ">=" else value <= self.goal
            for value in (self.low, self.high)
        ]
        return "yes" if all(reached) else "unclear" if any(reached) else "no"

    def __str__(self) -> str:
        ratio = f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"
        if self.goal is None:
            return f"{self.what:{WHAT}} {ratio}"
        return f"{self.what:{WHAT}} {ratio:{RATIO}} {self.sign} {self.goal:<{GOAL - 3}g} {self.met}"


def turn(work: Callable[[], object], times: int = 1) -> Turn:
    """A turn that repeats `work` a number of `times`."""
    return lambda: [seconds(work) for _ in range(times)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def faster(what: str, ours: Turn, reference: Turn, goal: float, count: int) -> Row:
    """Row for how many times faster we are than the reference, at least `goal`."""
    return _row(what, reference, ours, ">=", goal, count)


def cost(what: str, ours: Turn, reference: Turn, goal: float, count: int) -> Row:
    """Row for our time over that of the reference, at most `goal`."""
    return _row(what, ours, reference, "<=", goal, count)


def _row(what: str, above: Turn, below: Turn, sign: str, goal: float, count: int) -> Row:
    kept, _, _ = rounds.alternate([above, below], count)
    ratios = np.array([np.median(first) / np.median(second) for first, second in kept])
    return Row(what, float(np.median(ratios)), *interval(ratios), sign, goal)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median of `ratios` (n,), from a fixed seed."""
    if np.ptp(ratios) == 0:
        return float(ratios[0]), float(ratios[0])
    how = dict(method="percentile", rng=np.random.default_rng(0), n_resamples=2000)
    low, high = stats.bootstrap((ratios,), np.median, **how).confidence_interval
    return float(low), float(high)
