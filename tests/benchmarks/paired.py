"""What all benchmarks share: two pieces of work timed in turns, and the row of the table that their ratio makes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import cli, rounds, stats

THREADS = cli.cpu_count()
WHAT, RATIO, GOAL = 66, 22, 7  # widths of the columns
HEAD = f"{'what':{WHAT}} {'ratio [95 % interval]':{RATIO}} {'goal':{GOAL}} met"

Turn = Callable[[], list[float]]  # does a side's work once or more often; seconds of each


@dataclass(frozen=True)
class Settings:
    """What a benchmark may use: a folder of its own, and the images at `data`, or drawn ones; little of it in a smoke run."""

    folder: Path
    data: Path | None
    smoke: bool


@dataclass(frozen=True)
class Row:
    """One line of the table; `sign` says whether the ratio is to be at least (">=") or at most ("<=") `goal`."""

    what: str
    ratio: float
    low: float
    high: float
    sign: str
    goal: float

    @property
    def met(self) -> str:
        """Whether the goal is met, as far as the interval tells."""
        reached = [value >= self.goal if self.sign == ">=" else value <= self.goal for value in (self.low, self.high)]
        return "yes" if all(reached) else "unclear" if any(reached) else "no"

    def __str__(self) -> str:
        ratio = f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.what:{WHAT}} {ratio:{RATIO}} {self.sign} {self.goal:<{GOAL - 3}g} {self.met}"


def turn(work: Callable[[], object], times: int = 1) -> Turn:
    """A turn in which `work` is done so many `times`."""
    return lambda: [seconds(work) for _ in range(times)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def faster(what: str, ours: Turn, reference: Turn, goal: float, count: int) -> Row:
    """How many times faster we are than the reference: at least `goal`."""
    return _row(what, reference, ours, ">=", goal, count)


def cost(what: str, ours: Turn, reference: Turn, goal: float, count: int) -> Row:
    """How many times the reference's time we take: at most `goal`."""
    return _row(what, ours, reference, "<=", goal, count)


def _row(what: str, above: Turn, below: Turn, sign: str, goal: float, count: int) -> Row:
    kept, _, _ = rounds.alternate([above, below], count)
    ratios = np.array([np.median(first) / np.median(second) for first, second in kept])
    return Row(what, float(np.median(ratios)), *stats.median_interval(ratios), sign, goal)
