"""The protocol: its plan, the columns made of its samples, who is timed against whom, and that a model is as fast as itself."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import FakeWorker

from utils import cli, paths, stats
from utils.backends import registry
from utils.cli import Options
from utils.timing import fastest, protocol, rounds
from utils.training import checkpoints

QUICK, STANDARD = protocol.TIERS["quick"], protocol.TIERS["standard"]

# ---- plan


def test_the_rounds_of_all_launches_fill_the_tier():
    runs, count = protocol.plan([0.05, 0.05], QUICK, 32)
    assert (runs, count) == ([1, 1], round(10 / 6 / 0.2))


@pytest.mark.parametrize(
    ("tier", "batch_size", "queries"),
    [(QUICK, 1, 64), (QUICK, 8, 0), (STANDARD, 1, 662), (STANDARD, 8, 662)],
)
def test_a_scenario_gets_its_queries_however_slow_the_candidate_is(tier, batch_size, queries):
    runs, count = protocol.plan([20.0, 0.1], tier, batch_size)
    assert 2 * runs[0] * count * tier.launches >= max(1, queries)
    assert count == max(1, -(-queries // (2 * tier.launches)))


def test_tiers_have_the_queries_that_their_percentiles_need():
    assert stats.fewest_queries(0.90) == QUICK.queries == protocol.TIERS["brief"].queries == 64
    assert stats.fewest_queries(0.99) == STANDARD.queries == protocol.TIERS["mlperf"].queries == 662


# ---- summarize


def launch(candidate, eager, best=None, repeated=0, contended=False):
    cost = {"load_s": 0.5, "cold_start_s": 0.75, "peak_memory_mb": 300.0}
    return protocol.Launch(
        candidate, eager, eager if best is None else best, repeated, contended, cost
    )


def test_two_launches_by_hand():
    # Medians by round 2 and 4, against 6 and 6: ratios 3 and 1.5, of the launch 2.25; then 1 against 4 and 2.
    one = launch(
        [[2.0, 2.0, 5.0], [4.0, 4.0, 4.0]], [[6.0], [5.0, 7.0]], [[2.0], [4.0]], repeated=3
    )
    two = launch([[1.0]], [[4.0]], [[2.0]], contended=True)
    columns = protocol.summarize([one, two], 8)
    assert columns["speedup_vs_eager_fp32"] == pytest.approx((2.25 + 4) / 2)
    assert columns["speedup_vs_best_fp32"] == pytest.approx((1 + 2) / 2)
    assert columns["latency_ms_p50"] == pytest.approx(1000 * (3 + 1) / 2)
    assert columns["eager_fp32_ms"] == pytest.approx(1000 * (6 + 4) / 2)
    assert columns["best_fp32_ms"] == pytest.approx(1000 * (3 + 2) / 2)
    assert columns["latency_ms_mean"] == pytest.approx(1000 * 22 / 7)
    assert columns["throughput_ips"] == pytest.approx(8 / (22 / 7))
    assert (
        columns["n_timed"],
        columns["n_launches"],
        columns["n_rounds"],
        columns["n_repeated"],
    ) == (7, 2, 3, 3)
    assert columns["contended"] is True
    assert columns["samples_ms"] == [[[2000, 2000, 5000], [4000, 4000, 4000]], [[1000]]]
    json.dumps(columns, allow_nan=False)  # no NumPy numbers


def test_a_speedup_is_paired_within_rounds():
    # The machine halves its speed after each round; the candidate takes a third of the baseline's time throughout.
    steady = launch([[2.0**n] * 3 for n in range(10)], [[3 * 2.0**n] * 2 for n in range(10)])
    columns = protocol.summarize([steady] * 4, 1)
    assert [
        columns[f"speedup_vs_eager_fp32{end}"] for end in ("", "_ci_low", "_ci_high")
    ] == pytest.approx([3, 3, 3])


def test_in_constant_rounds_fp32_takes_the_latency_times_the_speedup():
    one = launch([[0.002] * 5] * 3, [[0.007] * 2] * 3, [[0.003] * 4] * 3)
    columns = protocol.summarize([one] * 2, 1)
    assert columns["latency_ms_p50"] == pytest.approx(2)
    assert (
        columns["eager_fp32_ms"]
        == pytest.approx(7)
        == pytest.approx(2 * columns["speedup_vs_eager_fp32"])
    )
    assert (
        columns["best_fp32_ms"]
        == pytest.approx(3)
        == pytest.approx(2 * columns["speedup_vs_best_fp32"])
    )


def test_a_slow_run_moves_no_median_of_fp32():
    """Latency, its reference and the speed-up are of the same kind: medians by round, so that they belong together."""
    eager = [[0.007, 0.007, 0.9], [0.007] * 3, [0.5] * 3]
    columns = protocol.summarize([launch([[0.002] * 3] * 3, eager)], 1)
    assert columns["eager_fp32_ms"] == columns["best_fp32_ms"] == pytest.approx(7)
    assert columns["speedup_vs_eager_fp32"] == pytest.approx(3.5)


@pytest.mark.parametrize(("q", "fewest"), [(90, 10), (95, 20), (99, 100)])
def test_a_percentile_needs_so_many_runs_that_it_is_not_just_the_slowest(q, fewest):
    def percentile(runs):
        times = [0.001 * (number + 1) for number in range(runs)]
        half = (
            launch([times[: runs // 2]], [[1.0]]),
            launch([times[runs // 2 :]], [[1.0]]),
        )  # runs of all launches count
        return protocol.summarize(half, 1)[f"latency_ms_p{q}"]

    assert percentile(fewest - 1) is None
    assert fewest * (q - 1) / 100 < percentile(fewest) < fewest


@pytest.fixture
def launches():
    generator = np.random.default_rng(0)

    def rounds_of(mean):
        return [(mean + generator.exponential(0.002, 9)).tolist() for _ in range(12)]

    return [launch(rounds_of(0.01), rounds_of(0.03)) for _ in range(6)]


def test_percentiles_are_numpys_over_all_runs_and_bounds_are_above_them(launches):
    columns = protocol.summarize(launches, 1)
    samples = 1000 * np.concatenate([run for launch in launches for run in launch.candidate])
    for q in (90, 95, 99):
        assert columns[f"latency_ms_p{q}"] == pytest.approx(np.percentile(samples, q))
    assert (
        columns["single_stream_p90_ms"]
        == stats.percentile_bound(samples, 0.9)
        > columns["latency_ms_p90"]
    )
    assert columns["multi_stream_p99_ms"] is None
    assert protocol.summarize(launches, 8)["multi_stream_p99_ms"] is None  # 648 queries
    assert (
        protocol.summarize([*launches, launches[0]], 8)["multi_stream_p99_ms"]
        > columns["latency_ms_p99"]
    )


def test_intervals_are_bootstrapped_over_launches(launches):
    columns = protocol.summarize(launches, 1)
    ratios = [
        np.median(
            [np.median(b) / np.median(a) for a, b in zip(one.candidate, one.eager, strict=True)]
        )
        for one in launches
    ]
    ends = columns["speedup_vs_eager_fp32_ci_low"], columns["speedup_vs_eager_fp32_ci_high"]
    assert ends == pytest.approx(stats.mean_interval(np.array(ratios)))
    assert columns["speedup_vs_eager_fp32"] == pytest.approx(np.mean(ratios))
    assert ends[0] < np.mean(ratios) < ends[1]


def test_without_a_faster_engine_its_samples_are_not_stored_twice(launches):
    assert protocol.summarize(launches, 1)["best_samples_ms"] == []
    other = [dataclasses.replace(one, best=[list(run) for run in one.eager]) for one in launches]
    assert len(protocol.summarize(other, 1)["best_samples_ms"]) == 6


# ---- measure


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The entries that `measure` returns and the log of what was done."""
    baseline = checkpoints.Checkpoint(tmp_path / "b.pt", None, "abc", {})
    monkeypatch.setattr(protocol, "Worker", FakeWorker)
    monkeypatch.setattr(registry, "problem", lambda name, device: None)
    monkeypatch.setattr(fastest, "Worker", FakeWorker)
    monkeypatch.setattr(rounds, "WARMUP_S", 0)

    def measure(batch_sizes, smoke, **how):
        FakeWorker.log.clear()
        options = Options(("fbgemm",), threads=2, smoke=smoke, batch_sizes=batch_sizes, **how)
        return protocol.measure(("fbgemm", "a.pt"), baseline, "images", options), list(
            FakeWorker.log
        )

    return measure


def test_every_batch_size_on_all_threads_and_the_smallest_on_one(measured):
    entries, log = measured((8, 1), smoke=False)
    assert [(entry["threads"], entry["batch_size"]) for entry in entries] == [
        (1, 1),
        (2, 1),
        (2, 8),
    ]
    for entry in entries:
        assert entry["speedup_vs_eager_fp32"] == pytest.approx(3)
        assert entry["speedup_vs_best_fp32"] == pytest.approx(2)
        assert entry["best_fp32"] in fastest.ENGINES[1:]
        assert (entry["eager_fp32_ms"], entry["best_fp32_ms"]) == pytest.approx((30, 20))
        assert (entry["n_launches"], entry["protocol"]) == (QUICK.launches, cli.PROTOCOL)
        assert (entry["cold_start_s"], entry["peak_memory_mb"], entry["contended"]) == (
            0.75,
            300,
            False,
        )
    assert [entry["offline_ips"] for entry in entries] == [None, None, pytest.approx(800)]
    candidates = [call for call in log if call[:2] == ("fbgemm", "start")]
    assert candidates == [
        ("fbgemm", "start", "a.pt", "cpu", n, False) for n in (1, 2) for _ in range(QUICK.launches)
    ]
    assert len([call for call in log if call[1] == "start"]) == len(
        [call for call in log if call[1] == "end"]
    )


def test_brief_timing_leaves_out_one_thread(measured):
    entries, _ = measured((8, 1), smoke=False, timing="brief")
    assert [(entry["threads"], entry["batch_size"], entry["tier"]) for entry in entries] == [
        (2, 1, "brief"),
        (2, 8, "brief"),
    ]
    assert {entry["n_launches"] for entry in entries} == {protocol.TIERS["brief"].launches}


def test_the_protocol_says_when_the_networks_ran_as_cuda_graphs(measured):
    entries, log = measured((1,), smoke=True, cuda_graph=True)
    assert [entry["protocol"] for entry in entries] == [f"{cli.PROTOCOL}+cuda-graph"]
    assert [call[5] for call in log if call[1] == "start"] == [True, True]  # eager FP32, too


def test_a_smoke_run_times_two_rounds_of_one_run_against_eager_fp32(measured):
    [entry], log = measured((1,), smoke=True)
    turns = [call for call in log if call[1] == "time"]
    assert turns == [
        (side, "time", 1)
        for side in ("fbgemm", "native", "native", "fbgemm", "native", "fbgemm", "fbgemm", "native")
    ]
    assert (entry["n_timed"], entry["n_rounds"], entry["best_fp32"]) == (4, 2, "native")


# ---- on real networks

A_A = """
import pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from helpers import mobilenet_checkpoint, split_of
from utils.cli import Options
from utils.timing import protocol

if __name__ == "__main__":
    folder = pathlib.Path({folder!r})
    baseline = mobilenet_checkpoint(folder / "model.pt")
    split = split_of(folder, np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8), [0])
    best = {{1: "onnxruntime"}}  # a third side, as there is nearly always
    options = Options(("native",), threads={threads})
    for repeat in range(10):
        launches = []
        for _ in range(protocol.TIERS["quick"].launches):
            launches += [launch for _, launch in protocol._launch(("native", baseline.path), baseline, split, best, options)]
        entry = protocol.summarize(launches, 1)
        print(entry["speedup_vs_eager_fp32_ci_low"], entry["speedup_vs_eager_fp32_ci_high"], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", sorted({1, cli.cpu_count()}))
def test_a_model_is_as_fast_as_itself_in_nine_of_ten_repeats(threads, tmp_path):
    script = tmp_path / "a_a.py"
    script.write_text(
        A_A.format(
            root=str(paths.ROOT),
            tests=str(paths.ROOT / "tests"),
            folder=str(tmp_path),
            threads=threads,
        )
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=1500, check=True
    )
    intervals = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(intervals) == 10
    assert sum(low <= 1 <= high for low, high in intervals) >= 9, intervals
