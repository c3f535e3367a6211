"""`utils.rounds`, `utils.timing`, `utils.fastest`: turns are fair, figures are right, and a model is as fast as itself."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils import checkpoints, cli, fastest, paths, rounds, stats, timing

QUICK, STANDARD = timing.TIERS["quick"], timing.TIERS["standard"]

# ---- rounds


class Clock:
    """Sides that take as long as told, and a log of whose turn it was."""

    def __init__(self, *seconds):
        self.seconds, self.log = [iter(own) for own in seconds], []

    def turns(self):
        return [lambda own=own: self.log.append(own) or [next(self.seconds[own])] for own in range(len(self.seconds))]


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
    times = [lambda: [float(next(now))] for _ in range(3)]  # every turn is slower than the one before by as much
    kept, _, _ = rounds.alternate(times, 5)
    assert all(len({sum(own) for own in sides}) == 1 for sides in kept)


def test_a_contended_round_is_repeated():
    clock = Clock(iter([1.0, 1.0, 1.0, 1.21, 1.0, 1.19]), forever(1.0))  # the second round is disturbed, the third hardly
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


# ---- plan


def test_the_rounds_of_all_launches_fill_the_tier():
    runs, count = timing.plan([0.05, 0.05], QUICK, 32)
    assert (runs, count) == ([1, 1], round(10 / 6 / 0.2))


@pytest.mark.parametrize(
    ("tier", "batch_size", "queries"), [(QUICK, 1, 64), (QUICK, 8, 0), (STANDARD, 1, 662), (STANDARD, 8, 662)]
)
def test_a_scenario_gets_its_queries_however_slow_the_candidate_is(tier, batch_size, queries):
    runs, count = timing.plan([20.0, 0.1], tier, batch_size)
    assert 2 * runs[0] * count * tier.launches >= max(1, queries)
    assert count == max(1, -(-queries // (2 * tier.launches)))


def test_tiers_have_the_queries_that_their_percentiles_need():
    assert stats.fewest_queries(0.90) == QUICK.queries == 64
    assert stats.fewest_queries(0.99) == STANDARD.queries == timing.TIERS["mlperf"].queries == 662


# ---- summarize


def launch(candidate, eager, best=None, repeated=0, contended=False):
    cost = {"load_s": 0.5, "cold_start_s": 0.75, "peak_memory_mb": 300.0}
    return timing.Launch(candidate, eager, eager if best is None else best, repeated, contended, cost)


def test_two_launches_by_hand():
    # Medians by round 2 and 4, against 6 and 6: ratios 3 and 1.5, of the launch 2.25; then 1 against 4 and 2.
    one = launch([[2.0, 2.0, 5.0], [4.0, 4.0, 4.0]], [[6.0], [5.0, 7.0]], [[2.0], [4.0]], repeated=3)
    two = launch([[1.0]], [[4.0]], [[2.0]], contended=True)
    found = timing.summarize([one, two], 8)
    assert found["speedup_vs_eager_fp32"] == pytest.approx((2.25 + 4) / 2)
    assert found["speedup_vs_best_fp32"] == pytest.approx((1 + 2) / 2)
    assert found["latency_ms_p50"] == pytest.approx(1000 * (3 + 1) / 2)
    assert found["latency_ms_mean"] == pytest.approx(1000 * 22 / 7)
    assert found["throughput_ips"] == pytest.approx(8 / (22 / 7))
    assert (found["n_timed"], found["n_launches"], found["n_rounds"], found["n_repeated"]) == (7, 2, 3, 3)
    assert found["contended"] is True
    assert found["samples_ms"] == [[[2000, 2000, 5000], [4000, 4000, 4000]], [[1000]]]
    json.dumps(found, allow_nan=False)  # no NumPy numbers


def test_a_speedup_is_paired_within_rounds():
    # The machine halves its speed after each round; the candidate takes a third of the baseline's time throughout.
    own = launch([[2.0**n] * 3 for n in range(10)], [[3 * 2.0**n] * 2 for n in range(10)])
    found = timing.summarize([own] * 4, 1)
    assert [found[f"speedup_vs_eager_fp32{end}"] for end in ("", "_ci_low", "_ci_high")] == pytest.approx([3, 3, 3])


@pytest.fixture
def launches():
    generator = np.random.default_rng(0)

    def rounds_of(mean):
        return [(mean + generator.exponential(0.002, 9)).tolist() for _ in range(12)]

    return [launch(rounds_of(0.01), rounds_of(0.03)) for _ in range(6)]


def test_percentiles_are_numpys_over_all_runs_and_bounds_are_above_them(launches):
    found = timing.summarize(launches, 1)
    samples = 1000 * np.concatenate([run for own in launches for run in own.candidate])
    for q in (90, 95, 99):
        assert found[f"latency_ms_p{q}"] == pytest.approx(np.percentile(samples, q))
    assert found["single_stream_p90_ms"] == stats.percentile_bound(samples, 0.9) > found["latency_ms_p90"]
    assert found["multi_stream_p99_ms"] is None
    assert timing.summarize(launches, 8)["multi_stream_p99_ms"] is None  # 648 queries
    assert timing.summarize([*launches, launches[0]], 8)["multi_stream_p99_ms"] > found["latency_ms_p99"]


def test_intervals_are_bootstrapped_over_launches(launches):
    found = timing.summarize(launches, 1)
    ratios = [np.median([np.median(b) / np.median(a) for a, b in zip(own.candidate, own.eager, strict=True)]) for own in launches]
    ends = found["speedup_vs_eager_fp32_ci_low"], found["speedup_vs_eager_fp32_ci_high"]
    assert ends == pytest.approx(stats.mean_interval(np.array(ratios)))
    assert found["speedup_vs_eager_fp32"] == pytest.approx(np.mean(ratios))
    assert ends[0] < np.mean(ratios) < ends[1]


def test_without_a_faster_engine_its_samples_are_not_stored_twice(launches):
    assert timing.summarize(launches, 1)["best_samples_ms"] == []
    other = [dataclasses.replace(own, best=[list(run) for run in own.eager]) for own in launches]
    assert len(timing.summarize(other, 1)["best_samples_ms"]) == 6


# ---- measure


class FakeWorker:
    """Says what it is asked to do and answers at once: the candidate takes 10 ms a run, eager FP32 30, another engine 20."""

    log: list = []  # noqa: RUF012

    def __init__(self, backend, path, device, threads, cuda_graph=False):
        self.name, self.waiting = backend, None
        self.log.append((backend, "start", path, device, threads, cuda_graph))

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
            return [{"fbgemm": 0.01, "native": 0.03}.get(self.name, 0.02)] * arguments[0]
        return {"load_s": 0.5, "cold_start_s": 0.75, "peak_memory_mb": 300} if name == "cost" else None

    def call(self, name, *arguments):
        self.send(name, *arguments)
        return self.receive()


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The entries that `measure` returns and the log of what was done."""
    baseline = checkpoints.Checkpoint(tmp_path / "b.pt", None, "abc", {})
    monkeypatch.setattr(timing, "Worker", FakeWorker)
    monkeypatch.setattr(fastest, "Worker", FakeWorker)
    monkeypatch.setattr(rounds, "WARMUP_S", 0)

    def measure(batch_sizes, smoke, cuda_graph=False):
        FakeWorker.log.clear()
        how = dict(timing="quick", cuda_graph=cuda_graph)
        args = argparse.Namespace(device="cpu", threads=2, smoke=smoke, batch_sizes=batch_sizes, **how)
        return timing.measure(("fbgemm", "a.pt"), baseline, "images", args), list(FakeWorker.log)

    return measure


def test_every_batch_size_on_all_threads_and_the_smallest_on_one(measured):
    entries, log = measured((8, 1), smoke=False)
    assert [(entry["threads"], entry["batch_size"]) for entry in entries] == [(1, 1), (2, 1), (2, 8)]
    for entry in entries:
        assert entry["speedup_vs_eager_fp32"] == pytest.approx(3)
        assert entry["speedup_vs_best_fp32"] == pytest.approx(2)
        assert entry["best_fp32"] in fastest.ENGINES[1:]
        assert (entry["n_launches"], entry["protocol"]) == (QUICK.launches, cli.PROTOCOL)
        assert (entry["cold_start_s"], entry["peak_memory_mb"], entry["contended"]) == (0.75, 300, False)
    assert [entry["offline_ips"] for entry in entries] == [None, None, pytest.approx(800)]
    candidates = [call for call in log if call[:2] == ("fbgemm", "start")]
    assert candidates == [("fbgemm", "start", "a.pt", "cpu", n, False) for n in (1, 2) for _ in range(QUICK.launches)]
    assert len([call for call in log if call[1] == "start"]) == len([call for call in log if call[1] == "end"])


def test_the_protocol_says_when_the_networks_ran_as_cuda_graphs(measured):
    entries, log = measured((1,), smoke=True, cuda_graph=True)
    assert [entry["protocol"] for entry in entries] == [f"{cli.PROTOCOL}+cuda-graph"]
    assert [call[5] for call in log if call[1] == "start"] == [True, True]  # eager FP32, too


def test_the_fastest_engine_is_looked_for_once(measured, tmp_path):
    measured((1,), smoke=False)
    _, log = measured((1,), smoke=False)
    assert {call[0] for call in log if call[1] == "start"} == {"fbgemm", "native", entry_of(tmp_path)}
    _, log = measured((1, 8), smoke=False)
    searched = [call for call in log if call[0] == "compile" and call[1] == "hold"]
    assert {call[3] for call in searched} == {8}


def entry_of(folder: Path) -> str:
    stored = json.loads((folder / "b.fastest.json").read_text())
    medians = next(iter(stored.values()))["batch_sizes"]["1"]
    assert medians["native"] == pytest.approx(30)
    return min(medians, key=medians.get)


def test_a_smoke_run_times_two_rounds_of_one_run_against_eager_fp32(measured):
    [entry], log = measured((1,), smoke=True)
    turns = [call for call in log if call[1] == "time"]
    assert turns == [
        (side, "time", 1) for side in ("fbgemm", "native", "native", "fbgemm", "native", "fbgemm", "fbgemm", "native")
    ]
    assert (entry["n_timed"], entry["n_rounds"], entry["best_fp32"]) == (4, 2, "native")


# ---- on real networks

A_A = """
import argparse, pathlib, sys
sys.path.insert(0, {root!r})
import numpy as np, torch
from utils import architectures, checkpoints, timing
from utils.data import Split

if __name__ == "__main__":
    torch.manual_seed(0)
    data = argparse.Namespace(describe=lambda: {{"sha256": "none"}})
    path = pathlib.Path({path!r})
    checkpoints.save(path, "mobilenetv3", architectures.build("mobilenetv3"), data, {{"fingerprint": ""}})
    images = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.uint8, (1, 224, 224, 3))
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape)
    images.flush()
    split = Split(images, np.zeros(1, int), ("a",), np.arange(1))
    best = {{1: "onnxruntime"}}  # a third side, as there is nearly always
    baseline = checkpoints.Checkpoint(path, None, checkpoints.sha256_of(path), {{}})
    args = argparse.Namespace(device="cpu", threads={threads}, smoke=False, cuda_graph=False)
    for repeat in range(10):
        found = []
        for _ in range(timing.TIERS["quick"].launches):
            started = timing._launch(("native", path), baseline, split, best, {threads}, timing.TIERS["quick"], args)
            found += [own for _, own in started]
        entry = timing.summarize(found, 1)
        print(entry["speedup_vs_eager_fp32_ci_low"], entry["speedup_vs_eager_fp32_ci_high"], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", sorted({1, cli.cpu_count()}))
def test_a_model_is_as_fast_as_itself_in_nine_of_ten_repeats(threads, tmp_path):
    script = tmp_path / "a_a.py"
    script.write_text(A_A.format(root=str(paths.ROOT), path=str(tmp_path / "model.pt"), threads=threads))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=1500, check=True)
    intervals = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(intervals) == 10
    assert sum(low <= 1 <= high for low, high in intervals) >= 9, intervals
