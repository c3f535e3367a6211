"""`utils.timing`: how much is run, what is made of the seconds, and that both sides take turns."""

import argparse

import numpy as np
import pytest

from utils import stats, timing

# ---- plan


def test_each_side_has_its_tenth_of_a_second_a_round():
    assert timing.plan([0.004, 0.025]) == ([25, 4], 30)


def test_a_slow_side_runs_once_a_round_and_the_rounds_fill_six_seconds():
    runs, rounds = timing.plan([0.05, 0.4])
    assert runs == [2, 1]
    assert rounds == 12  # of 0.1 + 0.4 seconds


@pytest.mark.parametrize(("seconds", "rounds"), [([3.0, 10.0], 5), ([1e-5, 1e-5], 30)])
def test_there_are_neither_too_few_rounds_nor_too_many(seconds, rounds):
    assert timing.plan(seconds)[1] == rounds


def test_more_time_is_not_spent_on_more_rounds_than_are_needed(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET_S", 60)
    assert timing.plan([0.1, 0.1])[1] == 30


# ---- summarize


def test_four_rounds_by_hand():
    # Medians by round: 2, 4, 3, 2 against 6, 6, 6, 8 seconds, so the ratios are 3, 1.5, 2, 4.
    candidate = [[2.0, 2.0, 5.0], [4.0, 4.0, 4.0], [3.0, 3.0, 3.0], [1.0, 2.0, 9.0]]
    baseline = [[6.0], [5.0, 7.0], [6.0, 6.0, 100.0], [8.0]]
    found = timing.summarize(candidate, baseline, 8)
    assert found["speedup_vs_eager_fp32"] == 2.5
    assert found["latency_ms_mean"] == pytest.approx(3500)
    assert found["throughput_ips"] == pytest.approx(8 / 3.5)
    assert found["latency_ms_p50"] == 3000
    assert found["latency_ms_std"] == pytest.approx(1000 * np.std(np.concatenate(candidate), ddof=1))
    assert (found["n_timed"], found["n_rounds"], found["contended"]) == (12, 4, True)


def test_a_speedup_is_paired_within_rounds():
    # The machine halves its speed after each round; the candidate takes a third of the baseline's time throughout.
    candidate = [[2.0**n] * 3 for n in range(10)]
    baseline = [[3 * 2.0**n] * 2 for n in range(10)]
    found = timing.summarize(candidate, baseline, 1)
    speedup = [found[f"speedup_vs_eager_fp32{end}"] for end in ("", "_ci_low", "_ci_high")]
    assert speedup == pytest.approx([3, 3, 3])


def test_above_one_is_faster_than_the_baseline():
    assert timing.summarize([[1.0], [1.0]], [[4.0], [4.0]], 1)["speedup_vs_eager_fp32"] == 4


@pytest.fixture
def rounds():
    generator = np.random.default_rng(0)
    return [[(0.01 + generator.exponential(0.002, 9)).tolist() for _ in range(12)] for _ in range(2)]


def test_percentiles_are_numpys_over_all_runs(rounds):
    found = timing.summarize(*rounds, 1)
    for q in (50, 90, 95, 99):
        assert found[f"latency_ms_p{q}"] == pytest.approx(1000 * np.percentile(np.concatenate(rounds[0]), q))


def test_intervals_are_bootstrapped_over_rounds(rounds):
    found = timing.summarize(*rounds, 1)
    medians = [np.median(rounds[side], axis=1) for side in (0, 1)]
    low, high = stats.median_interval(medians[0])
    assert (found["latency_ms_ci_low"], found["latency_ms_ci_high"]) == pytest.approx((1000 * low, 1000 * high))
    ratios = medians[1] / medians[0]
    ends = (found["speedup_vs_eager_fp32_ci_low"], found["speedup_vs_eager_fp32_ci_high"])
    assert ends == pytest.approx(stats.median_interval(ratios))
    assert found["speedup_vs_eager_fp32"] == pytest.approx(np.median(ratios))
    assert ends[0] < found["speedup_vs_eager_fp32"] < ends[1]


@pytest.mark.parametrize(("slowest", "contended"), [(1.19, False), (1.21, True)])
def test_rounds_that_differ_by_more_than_a_fifth_are_flagged(slowest, contended):
    candidate = [[1.0, 1.0, 3.0], [slowest] * 3, [1.1] * 3]  # one slow run in a round is not contention
    assert timing.summarize(candidate, [[1.0]] * 3, 1)["contended"] is contended


def test_all_samples_are_kept_in_milliseconds(rounds):
    found = timing.summarize(*rounds, 1)
    for name, own in zip(("samples_ms", "baseline_samples_ms"), rounds, strict=True):
        assert np.allclose(np.array(found[name]), 1000 * np.array(own), atol=1e-5)


def test_one_run_a_round_will_do():
    found = timing.summarize([[0.5]], [[1.0]], 4)
    assert (found["latency_ms_std"], found["latency_ms_ci_low"], found["latency_ms_ci_high"]) == (0, 500, 500)
    assert all(type(value) in (int, float, bool, list) for value in found.values())  # JSON takes no NumPy numbers


# ---- measure


class FakeWorker:
    """Says what it is asked to do and answers at once: the candidate takes 10 ms a run, the baseline 30 ms."""

    log: list = []  # noqa: RUF012

    def __init__(self, backend, path, device, threads):
        self.name, self.waiting = backend, None
        self.log.append((backend, "start", path, device, threads))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append((self.name, "end"))

    def send(self, name, *arguments):
        self.waiting = name, arguments
        self.log.append((self.name, name, *arguments))

    def receive(self):
        (name, arguments), self.waiting = self.waiting, None
        if name == "time":
            return [{"fbgemm": 0.01, "native": 0.03}[self.name]] * arguments[0]
        costs = {"load_s": 0.5, "peak_memory_mb": {"fbgemm": 300, "native": 500}[self.name]}
        return costs if name == "cost" else None

    def call(self, name, *arguments):
        self.send(name, *arguments)
        return self.receive()


@pytest.fixture
def measured(monkeypatch):
    """The entries that `measure` returns and the log of what was done, each worker's calls by its name."""
    monkeypatch.setattr(timing, "Worker", FakeWorker)
    monkeypatch.setattr(timing, "WARMUP_S", 0)

    def measure(batch_sizes, smoke):
        FakeWorker.log.clear()
        args = argparse.Namespace(device="cpu", threads=2, smoke=smoke)
        return timing.measure(("fbgemm", "a.pt"), ("native", "b.pt"), "images", batch_sizes, args), list(FakeWorker.log)

    return measure


def test_both_sides_take_turns_at_beginning(measured):
    [entry], log = measured((4,), smoke=False)
    turns = [call for call in log if call[1] == "time"]
    warm_up, rounds = turns[: 2 * timing.WARMUP_RUNS], turns[2 * timing.WARMUP_RUNS :]
    assert [call[2] for call in warm_up] == [1] * 6
    one, other = ("fbgemm", "time", 10), ("native", "time", 4)
    assert rounds == [one, other, other, one] * 13 + [one, other]  # 6 s / (0.1 + 0.12) s = 27 rounds
    assert (entry["speedup_vs_eager_fp32"], entry["n_timed"], entry["n_rounds"]) == (pytest.approx(3), 270, 27)
    assert (entry["batch_size"], entry["protocol"], entry["load_s"], entry["peak_memory_mb"]) == (4, timing.PROTOCOL, 0.5, 300)


def test_batch_sizes_ascend_on_the_same_two_processes(measured):
    entries, log = measured((8, 1), smoke=True)
    assert [entry["batch_size"] for entry in entries] == [1, 8]
    starts = [call for call in log if call[1] == "start"]
    assert starts == [("fbgemm", "start", "a.pt", "cpu", 2), ("native", "start", "b.pt", "cpu", 2)]
    holds = [call for call in log if call[1] == "hold"]
    assert holds == [(side, "hold", "images", size) for size in (1, 8) for side in ("fbgemm", "native")]
    assert sorted(call[0] for call in log if call[1] == "end") == ["fbgemm", "native"]


def test_a_smoke_run_times_two_rounds_of_one_run(measured):
    [entry], log = measured((1,), smoke=True)
    assert [call for call in log if call[1] == "time"] == [(side, "time", 1) for side in ("fbgemm", "native", "native", "fbgemm")]
    assert (entry["n_timed"], entry["n_rounds"]) == (2, 2)
