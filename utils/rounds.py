"""Fair turns: several sides timed one after the other, again and again, so that a noisy machine is noisy to all of them."""

import functools
import math
import time
from collections.abc import Callable

import numpy as np

from utils.data import Split
from utils.worker import Worker

WARMUP_S, WARMUP_RUNS = 0.3, 2
TURN_S = 0.05  # of one side; a round has two turns of each
CONTENDED = 1.2  # turns of a side that differ by more than this mean that something else was running
MIN_TRIES = 4  # contended rounds before they are kept, where few rounds are asked for

Round = list[list[float]]  # seconds of every run, by side


def hold(sides: list[Worker], split: Split, batch_size: int) -> None:
    """Give every side the same batch of images, all of them at once."""
    for side in sides:
        side.send("hold", split, batch_size)
    for side in sides:
        side.receive()


def turns(sides: list[Worker], runs: list[int]) -> list[Callable[[], list[float]]]:
    """What `alternate` takes: a turn of each side, of so many runs."""
    return [functools.partial(side.call, "time", n) for side, n in zip(sides, runs, strict=True)]


def warm_up(side: Worker) -> float:
    """Run until caches, clocks and just-in-time compilers have settled; returns the median seconds of the later runs."""
    seconds, started = [], time.perf_counter()
    while len(seconds) < WARMUP_RUNS or time.perf_counter() - started < WARMUP_S:
        seconds += side.call("time", 1)
    return float(np.median(seconds[len(seconds) // 2 :]))


def fill(seconds: list[float]) -> tuple[list[int], float]:
    """Runs a turn for each side whose runs take these `seconds`, and the seconds of a round."""
    runs = [max(1, math.ceil(TURN_S / own)) for own in seconds]
    return runs, 2 * sum(n * own for n, own in zip(runs, seconds, strict=True))


def alternate(turns: list[Callable[[], list[float]]], rounds: int) -> tuple[list[Round], int, bool]:
    """`rounds` rounds in which each of `turns`, which give the seconds of their runs, is called twice, as in A B C C B A.

    A contended round is repeated, until there have been as many of them as rounds were asked for, and at least `MIN_TRIES`.
    Returns the rounds kept, how many were contended, and whether these had to be kept, too, because clean ones were too few.
    """
    clean, contended = [], []
    while len(clean) < rounds and len(contended) < max(rounds, MIN_TRIES):
        first = (len(clean) + len(contended)) % len(turns)  # who begins changes
        order = [*range(first, len(turns)), *range(first)]
        there, back = {own: turns[own]() for own in order}, {own: turns[own]() for own in reversed(order)}
        medians = np.array([[np.median(half[own]) for own in order] for half in (there, back)])
        spread = (medians.max(0) / medians.min(0)).max()
        (clean if spread <= CONTENDED else contended).append([there[own] + back[own] for own in range(len(turns))])
    dirty = len(clean) < rounds
    return (clean + contended if dirty else clean), len(contended), dirty
