"""Turns are fair: palindromes, and contended rounds are repeated."""

import pytest

from utils.timing import rounds


class Clock:
    """Sides that take as long as told, and a log of whose turn it was."""

    def __init__(self, *seconds):
        self.seconds, self.log = [iter(times) for times in seconds], []

    def turns(self):
        return [
            lambda side=side: self.log.append(side) or [next(self.seconds[side])]
            for side in range(len(self.seconds))
        ]


def forever(value):
    while True:
        yield value


def test_each_round_is_a_palindrome_and_who_begins_changes():
    clock = Clock(forever(1.0), forever(2.0), forever(3.0))
    kept, contended, dirty = rounds.alternate(clock.turns(), 3)
    assert clock.log == [*(0, 1, 2, 2, 1, 0), *(1, 2, 0, 0, 2, 1), *(2, 0, 1, 1, 0, 2)]
    assert kept == [[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]] * 3
    assert (contended, dirty) == (0, False)


def test_a_steady_drift_cancels_within_a_round():
    now = iter(range(100, 10_000))
    times = [
        lambda: [float(next(now))] for _ in range(3)
    ]  # every turn is slower than the one before by as much
    kept, _, _ = rounds.alternate(times, 5)
    assert all(len({sum(times) for times in sides}) == 1 for sides in kept)


def test_a_contended_round_is_repeated():
    clock = Clock(
        iter([1.0, 1.0, 1.0, 1.21, 1.0, 1.19]), forever(1.0)
    )  # the second round is disturbed, the third hardly
    kept, contended, dirty = rounds.alternate(clock.turns(), 2)
    assert [sides[0] for sides in kept] == [[1.0, 1.0], [1.0, 1.19]]
    assert (contended, dirty) == (1, False)


def test_of_few_rounds_each_is_repeated_several_times():
    """One disturbance is not the end of a row of a single round."""
    clock = Clock(iter([1.0, 2.0, 1.0, 2.0, 1.0, 1.0]), forever(1.0))
    kept, contended, dirty = rounds.alternate(clock.turns(), 1)
    assert (len(kept), contended, dirty) == (1, 2, False)


def test_where_most_rounds_are_contended_all_are_kept_and_it_is_said():
    kept, contended, dirty = rounds.alternate(Clock(iter([1.0, 2.0] * 50), forever(1.0)).turns(), 4)
    assert (len(kept), contended, dirty) == (4, 4, True)


def test_one_slow_run_in_a_turn_is_not_contention():
    sides = [lambda: [1.0, 1.0, 9.0], lambda: [2.0, 2.0, 2.0]]
    assert rounds.alternate(sides, 2)[1:] == (0, False)


def test_a_turn_is_filled_with_runs():
    runs, seconds = rounds.fill([0.004, 0.025, 3.0])
    assert runs == [13, 2, 1]
    assert seconds == pytest.approx(2 * (13 * 0.004 + 2 * 0.025 + 3.0))
