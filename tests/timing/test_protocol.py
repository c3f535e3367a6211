"""The protocol: its plan, its columns, its sides, and that a model is as fast as itself."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import FakeWorker

from utils import cli, cpus, paths, stats
from utils.backends import registry
from utils.catalog import BACKENDS, Run
from utils.cli import Options
from utils.experiment import Experiment
from utils.timing import fastest, protocol, rounds
from utils.training import checkpoints

QUICK, STANDARD = protocol.TIERS["quick"], protocol.TIERS["standard"]

# ---- plan


def test_every_value_of_the_option_has_a_tier():
    assert tuple(protocol.TIERS) == cli.TIMING


def test_the_rounds_of_all_launches_fill_the_tier():
    runs, count = protocol.plan([0.05, 0.05], QUICK, 32)
    assert (runs, count) == ([1, 1], round(10 / 6 / 0.2))


@pytest.mark.parametrize(
    ("tier", "batch_size", "queries"),
    [(QUICK, 1, 64), (QUICK, 8, 0), (STANDARD, 1, 662), (STANDARD, 8, 662)],
)
def test_even_a_slow_candidate_gets_the_queries_of_a_scenario(tier, batch_size, queries):
    runs, count = protocol.plan([20.0, 0.1], tier, batch_size)
    assert 2 * runs[0] * count * tier.launches >= max(1, queries)
    assert count == max(1, -(-queries // (2 * tier.launches)))


def test_tiers_have_the_queries_that_their_percentiles_need():
    assert stats.fewest_queries(0.90) == QUICK.queries == protocol.TIERS["brief"].queries == 64
    assert stats.fewest_queries(0.99) == STANDARD.queries == protocol.TIERS["mlperf"].queries == 662


# ---- summarize


def launch(candidate, eager, best=None, same=None, **facts):
    cost = {"load_s": 0.5, "cold_start_s": 0.75, "peak_memory_mb": 300.0}
    times = {"candidate": candidate, "eager": eager, "best": eager if best is None else best}
    if same is not None:
        times["same_engine"] = same
    how = {"repeated": 0, "contended": False, "cost": cost} | facts
    return protocol.Launch(times, **how)


SESSIONS = [{"time_utc": "2026-01-01T00:00:00+00:00", "boot": "a"}]


def summarize(launches, batch_size, sessions=1):
    return protocol.summarize(launches, batch_size, SESSIONS * sessions)


def test_two_launches_by_hand():
    # In the first launch, the medians by round are 2 and 4, for eager FP32 6 and 6: the ratios
    # are 3 and 1.5, and their median is 2.25. In the second launch, 1 is compared with 4 and 2.
    candidate, eager = [[2.0, 2.0, 5.0], [4.0, 4.0, 4.0]], [[6.0], [5.0, 7.0]]
    one = launch(candidate, eager, [[2.0], [4.0]], [[8.0], [8.0]], repeated=3)
    two = launch([[1.0]], [[4.0]], [[2.0]], [[1.0]], contended=True)
    columns = summarize([one, two], 8)
    assert columns["speedup_vs_eager_fp32"] == pytest.approx(np.sqrt(2.25 * 4))
    assert columns["speedup_vs_best_fp32"] == pytest.approx(np.sqrt(1 * 2))
    assert columns["speedup_vs_same_engine_fp32"] == pytest.approx(np.sqrt(3 * 1))
    assert columns["latency_ms_p50"] == pytest.approx(np.sqrt(3 * 1))
    assert columns["eager_fp32_ms"] == pytest.approx(np.sqrt(6 * 4))
    assert columns["best_fp32_ms"] == pytest.approx(np.sqrt(3 * 2))
    assert columns["same_engine_fp32_ms"] == pytest.approx(np.sqrt(8 * 1))
    assert columns["latency_ms_mean"] == pytest.approx(22 / 7)
    assert columns["throughput_ips"] == pytest.approx(8000 / (22 / 7))
    counts = {"n_timed": 7, "n_sessions": 1, "n_launches": 2, "n_rounds": 3, "n_repeated": 3}
    assert {name: columns[name] for name in counts} == counts
    assert columns["contended"] is True
    assert columns["samples_ms"] == [[[2, 2, 5], [4, 4, 4]], [[1]]]
    assert columns["speedup_vs_eager_fp32_ci_low"] is None  # two launches give no interval
    json.dumps(columns, allow_nan=False)  # no NumPy numbers


def test_a_speedup_is_paired_within_rounds():
    # The machine halves its speed after each round. The candidate takes a third of FP32's time.
    steady = launch([[2.0**n] * 3 for n in range(10)], [[3 * 2.0**n] * 2 for n in range(10)])
    columns = summarize([steady] * 4, 1)
    for end in ("", "_ci_low", "_ci_high"):
        assert columns[f"speedup_vs_eager_fp32{end}"] == pytest.approx(3)


def test_in_constant_rounds_fp32_takes_the_latency_times_the_speedup():
    one = launch([[2.0] * 5] * 3, [[7.0] * 2] * 3, [[3.0] * 4] * 3)
    columns = summarize([one] * 2, 1)
    assert columns["latency_ms_p50"] == pytest.approx(2)
    assert columns["eager_fp32_ms"] == pytest.approx(7)
    assert columns["best_fp32_ms"] == pytest.approx(3)
    assert columns["speedup_vs_eager_fp32"] == pytest.approx(7 / 2)
    assert columns["speedup_vs_best_fp32"] == pytest.approx(3 / 2)
    assert "speedup_vs_same_engine_fp32" not in columns  # the engine does not run FP32 here


def test_a_slow_run_does_not_change_the_medians_of_fp32():
    """Latency, FP32's latency and the speed-up all come from medians by round, so they agree."""
    eager = [[7.0, 7.0, 900.0], [7.0] * 3, [500.0] * 3]
    columns = summarize([launch([[2.0] * 3] * 3, eager)], 1)
    assert columns["eager_fp32_ms"] == columns["best_fp32_ms"] == pytest.approx(7)
    assert columns["speedup_vs_eager_fp32"] == pytest.approx(3.5)


def test_disturbed_rounds_count_in_the_tails_and_not_in_the_medians():
    quiet = [[2.0] * 10] * 9
    columns = summarize([launch(quiet, [[6.0]] * 9, discarded=[[9.0] * 10], repeated=1)], 1)
    assert columns["latency_ms_p50"] == pytest.approx(2)
    assert columns["speedup_vs_eager_fp32"] == pytest.approx(3)
    assert columns["latency_ms_p95"] == pytest.approx(9)
    assert columns["latency_ms_mean"] == pytest.approx((90 * 2 + 10 * 9) / 100)
    assert (columns["n_timed"], columns["n_rounds"]) == (100, 9)
    assert columns["discarded_ms"] == [[[9.0] * 10]]


@pytest.mark.parametrize(("q", "fewest"), [(90, 10), (95, 20), (99, 100)])
def test_a_percentile_needs_enough_runs_to_differ_from_the_slowest_run(q, fewest):
    def percentile(runs):
        """The percentile of 1, 2, ... ms, split over two launches, because runs of all count."""
        times = [number + 1.0 for number in range(runs)]
        halves = times[: runs // 2], times[runs // 2 :]
        launches = [launch([half], [[1.0]]) for half in halves]
        return summarize(launches, 1)[f"latency_ms_p{q}"]

    assert percentile(fewest - 1) is None
    assert fewest * (q - 1) / 100 < percentile(fewest) < fewest


@pytest.fixture
def launches():
    generator = np.random.default_rng(0)

    def rounds_of(mean):
        return [(mean + generator.exponential(2, 9)).tolist() for _ in range(12)]

    return [launch(rounds_of(10), rounds_of(30)) for _ in range(6)]


def test_percentiles_are_numpys_over_all_runs_and_bounds_are_higher(launches):
    columns = summarize(launches, 1)
    samples = np.concatenate([run for launch in launches for run in launch.times["candidate"]])
    for q in (90, 95, 99):
        assert columns[f"latency_ms_p{q}"] == pytest.approx(np.percentile(samples, q))
    assert columns["single_stream_p90_ms"] == stats.percentile_bound(samples, 0.9)
    assert columns["single_stream_p90_ms"] > columns["latency_ms_p90"]
    assert columns["multi_stream_p99_ms"] is None
    assert summarize(launches, 8)["multi_stream_p99_ms"] is None  # 648 queries
    enough = summarize([*launches, launches[0]], 8)
    assert enough["multi_stream_p99_ms"] > columns["latency_ms_p99"]


def ratios_of(launches):
    ratios = []
    for one in launches:
        pairs = zip(one.times["candidate"], one.times["eager"], strict=True)
        ratios.append(np.median([np.median(fp32) / np.median(ours) for ours, fp32 in pairs]))
    return ratios


def test_the_interval_of_one_session_is_over_its_launches(launches):
    columns, ratios = summarize(launches, 1), ratios_of(launches)
    ends = columns["speedup_vs_eager_fp32_ci_low"], columns["speedup_vs_eager_fp32_ci_high"]
    assert ends == pytest.approx(stats.interval(ratios, [0] * 6))
    assert ends[0] < columns["speedup_vs_eager_fp32"] < ends[1]
    assert summarize(launches[:3], 1)["speedup_vs_eager_fp32_ci_low"] is None


def test_the_interval_of_several_sessions_is_over_sessions(launches):
    sessions = [
        dataclasses.replace(one, session=number) for number in range(3) for one in launches[:4]
    ]
    columns = summarize(sessions, 1, sessions=3)
    assert columns["n_sessions"] == 3
    # Equal sessions: between days nothing varied.
    middle = columns["speedup_vs_eager_fp32"]
    assert columns["speedup_vs_eager_fp32_ci_low"] == pytest.approx(middle)
    assert columns["speedup_vs_eager_fp32_ci_high"] == pytest.approx(middle)


def test_a_process_that_plays_several_parts_is_stored_once_and_restored(launches):
    assert summarize(launches, 1)["best_samples_ms"] == []
    eager = [[4.0]]
    third = launch([[1.0]], eager, [[2.0]], eager, discarded=[[3.0]], repeated=1)
    columns = summarize([*launches, third], 1)
    assert (len(columns["best_samples_ms"]), columns["same_engine_samples_ms"]) == (1, [])
    again = protocol.launches_of(json.loads(json.dumps(columns)))
    assert again == [*launches, third]
    assert again[0].times["best"] is again[0].times["eager"]
    assert summarize(again, 1) == columns


# ---- measure


@pytest.fixture
def experiment(tmp_path):
    """What a measurement needs to know, with names in place of images and weights."""
    baseline = checkpoints.Checkpoint(tmp_path / "b.pt", None, "abc", {})
    data = SimpleNamespace(study="drawn", test="images")

    def experiment(**how):
        options = Options(("fbgemm",), threads=2, results=tmp_path / "results", **how)
        return Experiment(Run("resnet18", "ptq", "int8"), options, data, baseline)

    return experiment


@pytest.fixture
def measured(monkeypatch, experiment):
    """Measure with fake processes; returns the entries and a log of all calls."""
    monkeypatch.setattr(protocol, "Worker", FakeWorker)
    monkeypatch.setattr(registry, "problem", lambda name, device: None)
    monkeypatch.setattr(fastest, "Worker", FakeWorker)
    monkeypatch.setattr(rounds, "WARMUP_S", 0)

    def measure(batch_sizes, smoke, backend="fbgemm", **how):
        FakeWorker.log.clear()
        asked = experiment(smoke=smoke, batch_sizes=batch_sizes, **how)
        entries = protocol.measure((backend, "a.pt"), asked)
        return entries, list(FakeWorker.log)

    return measure


def test_every_batch_size_on_all_threads_and_the_smallest_on_one(measured):
    entries, log = measured((8, 1), smoke=False)
    points = [(entry["threads"], entry["batch_size"]) for entry in entries]
    assert points == [(1, 1), (2, 1), (2, 8)]
    for entry in entries:
        assert entry["speedup_vs_eager_fp32"] == pytest.approx(3)
        assert entry["speedup_vs_best_fp32"] == pytest.approx(2)
        assert entry["speedup_vs_same_engine_fp32"] == pytest.approx(2)
        assert entry["same_engine_fp32"] == "frozen"  # TorchScript, as fbgemm's artifact
        assert entry["best_fp32"] in fastest.ENGINES[1:]
        assert (entry["eager_fp32_ms"], entry["best_fp32_ms"]) == pytest.approx((30, 20))
        assert (entry["n_launches"], entry["protocol"]) == (QUICK.launches, cli.PROTOCOL)
        assert (entry["cold_start_s"], entry["peak_memory_mb"]) == (0.75, 300)
        assert entry["contended"] is False
        assert (entry["n_sessions"], len(entry["sessions"])) == (1, 1)
    assert [entry["offline_ips"] for entry in entries] == [None, None, pytest.approx(800)]
    candidates = [call for call in log if call[:2] == ("fbgemm", "start")]
    one, two = (("fbgemm", "start", "a.pt", "cpu", threads, False) for threads in (1, 2))
    assert candidates == [one] * QUICK.launches + [two] * QUICK.launches
    names = [call[1] for call in log]
    assert names.count("start") == names.count("end")


def test_brief_timing_leaves_out_one_thread(measured):
    entries, _ = measured((8, 1), smoke=False, timing="brief")
    rows = [(entry["threads"], entry["batch_size"], entry["tier"]) for entry in entries]
    assert rows == [(2, 1, "brief"), (2, 8, "brief")]
    assert {entry["n_launches"] for entry in entries} == {protocol.TIERS["brief"].launches}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino_bf16", "half"])
def test_fp32_on_the_same_engine_takes_turns_too_and_each_process_once(measured, backend):
    entries, log = measured((1,), smoke=False, backend=backend)
    same = BACKENDS[backend].same_engine
    assert {entry["same_engine_fp32"] for entry in entries} == {same}
    (best,) = {entry["best_fp32"] for entry in entries}
    started = Counter(call[0] for call in log if call[1:4] == ("start", "a.pt", "cpu"))
    assert started == {backend: 2 * QUICK.launches}
    held = [call[0] for call in log if call[1] == "hold"]
    assert set(held[-len({backend, "native", best, same}) :]) == {backend, "native", best, same}


def test_without_fp32_on_the_same_engine_there_is_no_such_speedup(measured, monkeypatch):
    lacking = lambda name, device: "lacking" if name == "frozen" else None  # noqa: E731
    monkeypatch.setattr(registry, "problem", lacking)
    entries, _ = measured((1,), smoke=False)
    assert {entry["same_engine_fp32"] for entry in entries} == {None}
    assert all("speedup_vs_same_engine_fp32" not in entry for entry in entries)


def test_another_session_is_timed_at_the_same_points_against_the_same_engines(
    measured, experiment, monkeypatch
):
    entries, _ = measured((1, 8), smoke=False)
    monkeypatch.setattr(fastest, "find", None)  # nothing is compared anew
    FakeWorker.log.clear()
    joined = protocol.again(("fbgemm", "a.pt"), experiment(batch_sizes=(1,)), entries)
    assert [(entry["threads"], entry["batch_size"]) for entry in joined] == [(1, 1), (2, 1), (2, 8)]
    for before, after in zip(entries, joined, strict=True):
        assert after["best_fp32"] == before["best_fp32"]
        assert (after["n_sessions"], len(after["sessions"])) == (2, 2)
        assert after["n_launches"] == 2 * before["n_launches"]
        assert [facts["session"] for facts in after["launches"]] == [0] * 6 + [1] * 6
        assert after["samples_ms"][: QUICK.launches] == before["samples_ms"]
    assert sum(entry["offline_ips"] is not None for entry in joined) == 1


def test_the_protocol_names_cuda_graphs(measured):
    entries, log = measured((1,), smoke=True, cuda_graph=True)
    assert [entry["protocol"] for entry in entries] == [f"{cli.PROTOCOL}+cuda-graph"]
    assert [call[5] for call in log if call[1] == "start"] == [True, True]  # also eager FP32


def test_a_smoke_run_times_two_rounds_of_one_run_against_eager_fp32(measured):
    [entry], log = measured((1,), smoke=True)
    turns = [(call[0], call[2]) for call in log if call[1] == "time"]
    ours, fp32 = ("fbgemm", 1), ("native", 1)
    assert turns == [ours, fp32, fp32, ours, fp32, ours, ours, fp32]
    assert (entry["n_timed"], entry["n_rounds"], entry["best_fp32"]) == (4, 2, "native")


# ---- on real networks

A_A = """
import pathlib, sys, types
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from helpers import mobilenet_checkpoint, split_of
from utils import environment
from utils.catalog import Run
from utils.cli import Options
from utils.experiment import Experiment
from utils.timing import protocol

if __name__ == "__main__":
    folder = pathlib.Path({folder!r})
    baseline = mobilenet_checkpoint(folder / "model.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    split = split_of(folder, pixels, [0])
    best = {{1: "onnxruntime"}}  # nearly always there is a third side
    options = Options(("native",), threads={threads})
    data = types.SimpleNamespace(test=split)
    experiment = Experiment(Run("mobilenetv3", "fp32", "fp32"), options, data, baseline)
    for repeat in range(10):
        launches = []
        for _ in range(protocol.TIERS["quick"].launches):
            again = protocol._launch(("native", baseline.path), experiment, best, options)
            launches += [launch for _, launch in again]
        entry = protocol.summarize(launches, 1, [environment.session()])
        low, high = (entry[f"speedup_vs_eager_fp32_ci_{{end}}"] for end in ("low", "high"))
        print(low, high, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", sorted({1, cpus.default_threads()}))
def test_a_model_is_as_fast_as_itself_in_nine_of_ten_repeats(threads, tmp_path):
    script = tmp_path / "a_a.py"
    root, tests, folder = str(paths.ROOT), str(paths.ROOT / "tests"), str(tmp_path)
    script.write_text(A_A.format(root=root, tests=tests, folder=folder, threads=threads))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=1500, check=True
    )
    intervals = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(intervals) == 10
    assert sum(low <= 1 <= high for low, high in intervals) >= 9, intervals
