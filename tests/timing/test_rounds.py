"""Rounds are palindromes, and contended rounds are repeated."""

import functools
import itertools

import pytest

from utils.timing import rounds


class Clock:
    """Sides that take the given seconds, and a log of their turns."""

    def __init__(self, *seconds):
        self.seconds, self.log = [iter(times) for times in seconds], []

    def take(self, side):
        self.log.append(side)
        return [next(self.seconds[side])]

    def turns(self):
        return [functools.partial(self.take, side) for side in range(len(self.seconds))]


def test_each_round_is_a_palindrome_that_another_side_begins():
    clock = Clock(itertools.repeat(1.0), itertools.repeat(2.0), itertools.repeat(3.0))
    kept, discarded, contended, dirty = rounds.alternate(clock.turns(), 3)
    assert clock.log == [*(0, 1, 2, 2, 1, 0), *(1, 2, 0, 0, 2, 1), *(2, 0, 1, 1, 0, 2)]
    assert kept == [[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]] * 3
    assert (discarded, contended, dirty) == ([], 0, False)


def test_a_steady_drift_cancels_within_a_round():
    now = itertools.count(100.0)  # every turn takes 1 s longer than the turn before
    kept, *_ = rounds.alternate([lambda: [next(now)]] * 3, 5)
    assert all(len({sum(times) for times in sides}) == 1 for sides in kept)


def test_a_contended_round_is_repeated():
    # The second round is disturbed, the third hardly.
    clock = Clock([1.0, 1.0, 1.0, 1.21, 1.0, 1.19], itertools.repeat(1.0))
    kept, discarded, contended, dirty = rounds.alternate(clock.turns(), 2)
    assert [sides[0] for sides in kept] == [[1.0, 1.0], [1.0, 1.19]]
    assert [sides[0] for sides in discarded] == [[1.0, 1.21]]  # for the tails
    assert (contended, dirty) == (1, False)


def test_a_single_round_is_repeated_several_times():
    """One disturbance must not spoil a measurement of one round."""
    clock = Clock([1.0, 2.0, 1.0, 2.0, 1.0, 1.0], itertools.repeat(1.0))
    kept, discarded, contended, dirty = rounds.alternate(clock.turns(), 1)
    assert len(discarded) == 2
    assert (len(kept), contended, dirty) == (1, 2, False)


def test_if_most_rounds_are_contended_all_are_kept_and_reported():
    clock = Clock([1.0, 2.0] * 50, itertools.repeat(1.0))
    kept, discarded, contended, dirty = rounds.alternate(clock.turns(), 4)
    assert discarded == []  # none counts twice
    assert (len(kept), contended, dirty) == (4, 4, True)


def test_one_slow_run_in_a_turn_is_not_contention():
    sides = [lambda: [1.0, 1.0, 9.0], lambda: [2.0, 2.0, 2.0]]
    assert rounds.alternate(sides, 2)[1:] == ([], 0, False)


def test_a_turn_is_filled_with_runs():
    runs, seconds = rounds.fill([0.004, 0.025, 3.0])
    assert runs == [13, 2, 1]
    assert seconds == pytest.approx(2 * (13 * 0.004 + 2 * 0.025 + 3.0))


@pytest.mark.parametrize(("runs", "before"), [(1, 1), (2, 1), (3, 2), (13, 2)])
def test_the_first_runs_of_a_turn_do_not_count(runs, before):
    asked = []

    class Side:
        def call(self, *arguments):
            asked.append(arguments)

    (turn,) = rounds.turns([Side()], [runs])
    turn()
    assert asked == [("time", runs, before)]
