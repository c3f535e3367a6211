"""Time workers in alternating turns, so that a noisy machine affects all of them equally."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from utils.data.dataset import Split
from utils.timing.worker import Worker

WARMUP_S, WARMUP_RUNS = 0.3, 2
# Runs at the start of a turn that do not count. After the other sides' turns, caches and threads
# are cold: over 30,000 turns on three processors, the first run took 1.05 to 1.6 times the median
# of its engine, the second 1.00 to 1.33 and the third 1.00 to 1.09.
SETTLING = 2
TURN_S = 0.05  # of one side; a round has two turns of each side
CONTENDED = 1.2  # above this ratio of a side's two turns, something else was running
SEARCH_S, MIN_ROUNDS, MAX_ROUNDS = 3.0, 3, 20  # of a comparison, all sides together
MIN_TRIES = 4  # contended rounds before they are kept, if few rounds are wanted

Turn = Callable[[], list[float]]  # runs one side several times; returns the seconds of each run
Round = list[list[float]]  # seconds of every run, by side


class Rounds(NamedTuple):
    """What `alternate` measured."""

    quiet: list[Round]  # for medians; all rounds if too few were clean
    discarded: list[Round]  # contended rounds that are not among `quiet`, for tails
    repeated: int  # number of contended rounds
    contended: bool  # whether contended rounds had to be kept


def hold(sides: list[Worker], split: Split, batch_size: int) -> None:
    """Give all sides the same batch of images, at the same time."""
    for side in sides:
        side.send("hold", split, batch_size)
    for side in sides:
        side.receive()


def turns(sides: list[Worker], runs: list[int]) -> list[Turn]:
    """Make the turns for `alternate`: each times the `runs` of one side, once it has settled.

    A turn of one or two runs is so long that a single run settles it.
    """
    return [
        functools.partial(side.call, "time", n, min(SETTLING, max(1, n - 1)))
        for side, n in zip(sides, runs, strict=True)
    ]


def warm_up(side: Worker) -> float:
    """Run until caches, clocks and just-in-time compilers have settled.

    Returns the median seconds of the later half of the runs.
    """
    seconds, started = [], time.perf_counter()
    while len(seconds) < WARMUP_RUNS or time.perf_counter() - started < WARMUP_S:
        seconds += side.call("time", 1)
    return float(np.median(seconds[len(seconds) // 2 :]))


def fill(seconds: list[float]) -> tuple[list[int], float]:
    """Choose how many runs each side needs for a turn of at least `TURN_S`.

    `seconds` has the time of one run of each side. Returns the runs of each side and the seconds of
    a round.
    """
    runs = [max(1, math.ceil(TURN_S / run)) for run in seconds]
    return runs, 2 * sum(n * run for n, run in zip(runs, seconds, strict=True))


def compare(
    sides: list[Worker], split: Split, batch_size: int, count: int | None = None
) -> np.ndarray:
    """Time `sides` on the same batch in alternating rounds; returns seconds, (rounds, sides).

    An entry is the median of one side's runs in one round. There are `count` rounds. By default,
    these are all that fit into SEARCH_S seconds, at least MIN_ROUNDS and at most MAX_ROUNDS.
    """
    hold(sides, split, batch_size)
    runs, round_s = fill([warm_up(side) for side in sides])
    count = count or min(MAX_ROUNDS, max(MIN_ROUNDS, round(SEARCH_S / round_s)))
    return np.array([_medians(times) for times in alternate(turns(sides, runs), count).quiet])


def alternate(turns: list[Turn], rounds: int) -> Rounds:
    """Take each of `turns` twice per round, in the order A B C C B A, for `rounds` clean rounds.

    A contended round is repeated, until there are max(`rounds`, `MIN_TRIES`) contended rounds. If
    too few rounds are clean by then, the contended ones are kept as well.
    """
    clean, contended = [], []
    while len(clean) < rounds and len(contended) < max(rounds, MIN_TRIES):
        tried = len(clean) + len(contended)
        there, back = _palindrome(turns, tried % len(turns))  # another side begins each round
        both = [first + second for first, second in zip(there, back, strict=True)]
        if _ratio(there, back) <= CONTENDED:
            clean.append(both)
        else:
            contended.append(both)
    if len(clean) == rounds:
        return Rounds(clean, contended, len(contended), False)
    return Rounds(clean + contended, [], len(contended), True)


def _palindrome(turns: list[Turn], first: int) -> tuple[Round, Round]:
    """Take all turns from number `first` on, then all in reverse; returns both halves, by side."""
    sides = range(len(turns))
    order = [*sides[first:], *sides[:first]]
    there = {side: turns[side]() for side in order}
    back = {side: turns[side]() for side in reversed(order)}
    return [there[side] for side in sides], [back[side] for side in sides]


def _ratio(there: Round, back: Round) -> float:
    """Return the largest ratio between the medians of a side's two turns."""
    medians = np.array([_medians(there), _medians(back)])
    return (medians.max(0) / medians.min(0)).max()


def _medians(times: Round) -> list[float]:
    return [np.median(seconds) for seconds in times]
