"""Time several sides in alternating turns, so that a noisy machine disturbs all alike."""

import functools
import math
import time
from collections.abc import Callable

import numpy as np

from utils.data.dataset import Split
from utils.timing.worker import Worker

WARMUP_S, WARMUP_RUNS = 0.3, 2
TURN_S = 0.05  # of one side; a round has two turns of each side
CONTENDED = 1.2  # a higher ratio of a side's two turns means that something else was running
SEARCH_S, MIN_ROUNDS, MAX_ROUNDS = 3.0, 3, 20  # of a comparison, all sides together
MIN_TRIES = 4  # contended rounds before they are kept, if few rounds are asked for

Round = list[list[float]]  # seconds of every run, by side


def hold(sides: list[Worker], split: Split, batch_size: int) -> None:
    """Give every side the same batch of images, all of them at once."""
    for side in sides:
        side.send("hold", split, batch_size)
    for side in sides:
        side.receive()


def turns(sides: list[Worker], runs: list[int]) -> list[Callable[[], list[float]]]:
    """Make the turns that `alternate` takes: for each side, a call that times its `runs`."""
    return [functools.partial(side.call, "time", n) for side, n in zip(sides, runs, strict=True)]


def warm_up(side: Worker) -> float:
    """Run until caches, clocks and just-in-time compilers have settled.

    Returns the median seconds of the later half of the runs.
    """
    seconds, started = [], time.perf_counter()
    while len(seconds) < WARMUP_RUNS or time.perf_counter() - started < WARMUP_S:
        seconds += side.call("time", 1)
    return float(np.median(seconds[len(seconds) // 2 :]))


def fill(seconds: list[float]) -> tuple[list[int], float]:
    """Choose how often each side runs in a turn, so that the turn takes at least `TURN_S`.

    `seconds` has the time of one run of each side. Returns the runs of each side and the seconds of
    a round.
    """
    runs = [max(1, math.ceil(TURN_S / run)) for run in seconds]
    return runs, 2 * sum(n * run for n, run in zip(runs, seconds, strict=True))


def compare(
    sides: list[Worker], split: Split, batch_size: int, count: int | None = None
) -> np.ndarray:
    """Time all `sides` on the same batch in alternating rounds; returns seconds of a batch, (rounds, sides).

    An entry is the median of one side's runs in one round. There are `count` rounds, or by default as
    many as fit into SEARCH_S seconds, but at least MIN_ROUNDS and at most MAX_ROUNDS.
    """
    hold(sides, split, batch_size)
    runs, round_s = fill([warm_up(side) for side in sides])
    count = count or min(MAX_ROUNDS, max(MIN_ROUNDS, round(SEARCH_S / round_s)))
    kept, _, _ = alternate(turns(sides, runs), count)
    return np.array([[np.median(seconds) for seconds in each] for each in kept])


def alternate(turns: list[Callable[[], list[float]]], rounds: int) -> tuple[list[Round], int, bool]:
    """Call each of `turns` twice per round, in the order A B C C B A, for `rounds` clean rounds.

    A turn returns the seconds of its runs. A contended round is repeated, but no more after
    max(`rounds`, `MIN_TRIES`) contended rounds. Returns the rounds kept, the number of contended
    rounds, and whether these were kept, too, because too few rounds were clean.
    """
    clean, contended = [], []
    while len(clean) < rounds and len(contended) < max(rounds, MIN_TRIES):
        first = (len(clean) + len(contended)) % len(turns)  # another side begins each round
        order = [*range(first, len(turns)), *range(first)]
        there, back = (
            {side: turns[side]() for side in order},
            {side: turns[side]() for side in reversed(order)},
        )
        medians = np.array([[np.median(half[side]) for side in order] for half in (there, back)])
        spread = (medians.max(0) / medians.min(0)).max()
        (clean if spread <= CONTENDED else contended).append(
            [there[side] + back[side] for side in range(len(turns))]
        )
    dirty = len(clean) < rounds
    return (clean + contended if dirty else clean), len(contended), dirty
