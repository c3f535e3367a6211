"""Time inference by the protocol `palindromic-rounds`, the same for every backend.

The candidate, eager FP32, the study's fastest FP32 and FP32 on the candidate's engine are each
loaded in a fresh process with a fixed number of threads, on CPUs that no other timing uses. The
thread that calls the network runs on the same CPU in each. After a warm-up the processes take turns
in short rounds, first in one order and then backwards (A B C C B A), so that a machine that slows
down or speeds up affects all of them equally. The first runs of a turn do not count. If the two
turns of one side differ too much, something else was running, and the round is repeated: medians
and ratios come from quiet rounds, means and percentiles from all of them.

Then all processes are started again, several times. A process is some percent faster or slower for
as long as it lives, depending on where its memory happens to lie. More rounds cannot show this
(Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time"). The latency of a launch is
the median over its rounds, and its speed-up the median of the ratios within its rounds.

A *session* is one such measurement. Days and restarts change a ratio more than launches do, so a
run may be timed again (`--again`): its figures are then means over sessions, and `stats.interval`
covers sessions. With one session, the interval covers its launches only. With `--cuda-graph` all
sides run as CUDA graphs, including "eager" FP32, and the protocol's name says so.

The scenarios come from MLPerf inference (Reddi et al. 2020, arXiv:1911.02549; rules in
mlcommons/inference_policies), with fewer queries and without its audit, so these are not MLPerf
results. SingleStream: a batch of 1, sent when the previous one is answered, p90. MultiStream: a
batch of 8, p99. Offline: the throughput at the best batch size.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils import environment, progress, stats
from utils.backends import registry
from utils.catalog import BACKENDS
from utils.cli import Options
from utils.experiment import Experiment
from utils.timing import cores, fastest, rounds
from utils.timing.worker import Worker

SINGLE_STREAM, MULTI_STREAM = 1, 8  # images in a query


@dataclass(frozen=True)
class Tier:
    """How long to time one row."""

    seconds: float  # of all sides and launches together
    launches: int
    queries: int  # fewest runs of the candidate for a scenario
    single: bool = True  # also time the smallest batch size with one thread


# A p90 needs at least 64 queries, a p99 at least 662: see `stats.percentile_bound`.
TIERS = {
    "brief": Tier(seconds=3, launches=3, queries=64, single=False),
    "quick": Tier(seconds=10, launches=6, queries=64),
    "standard": Tier(seconds=60, launches=10, queries=662),
    "mlperf": Tier(seconds=600, launches=10, queries=662),
}


# Sides of a comparison, with the key of their samples in a run's JSON.
SAMPLES = {
    "candidate": "samples_ms",
    "eager": "eager_samples_ms",
    "best": "best_samples_ms",
    "same_engine": "same_engine_samples_ms",
}
SPEEDUPS = {  # by the side that is compared with the candidate
    "eager": "speedup_vs_eager_fp32",
    "best": "speedup_vs_best_fp32",
    "same_engine": "speedup_vs_same_engine_fp32",
}
MILLISECONDS = {
    "eager": "eager_fp32_ms",
    "best": "best_fp32_ms",
    "same_engine": "same_engine_fp32_ms",
}


@dataclass
class Launch:
    """Times of one launch of all processes: milliseconds of every run, by round, for each side.

    Sides that are the same process share one list.
    """

    times: dict[str, list[list[float]]]  # by the names in `SAMPLES`
    repeated: int  # number of contended rounds
    contended: bool  # whether contended rounds had to be kept
    cost: dict[str, float]  # of the candidate, from `Worker.call("cost")`
    discarded: list[list[float]] = field(default_factory=list)  # the candidate's, of other rounds
    session: int = 0


def measure(candidate: tuple[str, Path], experiment: Experiment) -> list[dict]:
    """Measure latency and throughput of a candidate, given as (backend, artifact).

    Returns columns of results.csv, one dict for each number of threads and batch size. Every batch
    size is timed with all threads, and the smallest also with one thread, unless the tier is brief.
    Images come from the test split. Batch sizes ascend, so that the peak memory after each is the
    peak of that batch size. A smoke run times two rounds of one run each, with all threads only.
    """
    options = experiment.options
    sizes = sorted(options.batch_sizes)
    sweep = {options.threads: sizes}
    if not options.smoke and TIERS[options.timing].single:
        sweep = {1: sizes[:1]} | sweep
    entries, points = [], sum(map(len, sweep.values()))
    with progress.Bar("timing", _count(options) * points, "batch sizes") as bar:
        for threads, batch_sizes in sweep.items():
            here = options.replace(threads=threads)
            best = fastest.find(experiment, batch_sizes, here)
            names = {size: engines["best_fp32"] for size, engines in best.items()}
            collected = _launches(candidate, experiment, names, here, bar)
            for size in batch_sizes:
                entry = {"threads": threads, "batch_size": size}
                entry |= {"protocol": options.protocol, "tier": options.tier}
                entry |= {"same_engine_fp32": _same_engine(candidate[0], options)}
                sessions = [environment.session()]
                entries.append(entry | summarize(collected[size], size, sessions) | best[size])
    return with_offline(entries)


def with_offline(entries: list[dict]) -> list[dict]:
    """Set the throughput `offline_ips` where it is highest, and None elsewhere."""
    for entry in entries:
        entry["offline_ips"] = None
    fastest_entry = max(entries, key=lambda entry: entry["throughput_ips"])
    fastest_entry["offline_ips"] = fastest_entry["throughput_ips"]
    return entries


def again(candidate: tuple[str, Path], experiment: Experiment, entries: list[dict]) -> list[dict]:
    """Time a candidate in another session, at the points of `entries`, by the same protocol.

    `entries` is the section `timing` of its record. Returns the section over all sessions. The
    fastest FP32 stays the one of the record.
    """
    options, measured = experiment.options.replace(timing=entries[0]["tier"]), {}
    with progress.Bar("timing", _count(options) * len(entries), "batch sizes") as bar:
        for threads in dict.fromkeys(entry["threads"] for entry in entries):
            names = {
                entry["batch_size"]: entry["best_fp32"]
                for entry in entries
                if entry["threads"] == threads
            }
            here = options.replace(threads=threads)
            for size, launches in _launches(candidate, experiment, names, here, bar).items():
                measured[threads, size] = launches
    joined = []
    for entry in entries:
        size, known = entry["batch_size"], launches_of(entry)
        launches = measured[entry["threads"], size]
        for launch in launches:
            launch.session = len(entry["sessions"])
        sessions = [*entry["sessions"], environment.session()]
        joined.append(entry | summarize(known + launches, size, sessions))
    return with_offline(joined)


def _same_engine(backend: str, options: Options) -> str | None:
    """Return the backend that runs FP32 on the engine of `backend`; None if it cannot run here."""
    name = BACKENDS[backend].same_engine
    if options.smoke or registry.problem(name, options.device):
        return None
    return None if options.timing == "brief" and BACKENDS[name].compiles else name


def _count(options: Options) -> int:
    """Return how often all processes are started."""
    return 1 if options.smoke else TIERS[options.timing].launches


def _launches(
    candidate: tuple[str, Path],
    experiment: Experiment,
    best: dict[int, str],
    options: Options,
    bar: progress.Bar,
) -> dict[int, list[Launch]]:
    """Start all processes as often as the tier wants; returns the launches by batch size."""
    collected: dict[int, list[Launch]] = {size: [] for size in best}
    for _ in range(_count(options)):
        for size, launch in _launch(candidate, experiment, best, options):
            collected[size].append(launch)
            bar.step(note=f"batch {size}, {options.threads} threads")
    return collected


def _launch(
    candidate: tuple[str, Path], experiment: Experiment, best: dict[int, str], options: Options
) -> Iterator[tuple[int, Launch]]:
    """Start all processes once; yields each batch size of `best` and its `Launch`.

    `best` maps a batch size to the name of its fastest FP32 engine.
    """
    how = options.device, options.threads, options.cuda_graph
    same, baseline = _same_engine(candidate[0], options), experiment.baseline.path
    names = filter(None, dict.fromkeys(["native", *best.values(), same]))
    with contextlib.ExitStack() as stack:
        if not options.smoke:
            stack.enter_context(cores.reserved(options.threads))
        ours = stack.enter_context(Worker(*candidate, *how))
        fp32 = {name: stack.enter_context(Worker(name, baseline, *how)) for name in names}
        for size, name in best.items():
            sides = {"candidate": ours, "eager": fp32["native"], "best": fp32[name]}
            if same:
                sides["same_engine"] = fp32[same]
            yield size, _time(sides, experiment, size, options)


def _time(
    sides: dict[str, Worker], experiment: Experiment, batch_size: int, options: Options
) -> Launch:
    """Time the processes of `sides`, each once even if it plays several parts."""
    workers = list(dict.fromkeys(sides.values()))
    rounds.hold(workers, experiment.data.test, batch_size)
    if options.smoke:
        runs, count = [1] * len(workers), 2
    else:
        seconds = [rounds.warm_up(worker) for worker in workers]
        runs, count = plan(seconds, TIERS[options.timing], batch_size)
    measured = rounds.alternate(rounds.turns(workers, runs), count)
    columns = [
        [_milliseconds(times) for times in side] for side in zip(*measured.quiet, strict=True)
    ]
    by_worker = dict(zip(workers, columns, strict=True))
    return Launch(
        times={name: by_worker[worker] for name, worker in sides.items()},
        repeated=measured.repeated,
        contended=measured.contended,
        cost=workers[0].call("cost"),
        discarded=[_milliseconds(times[0]) for times in measured.discarded],
    )


def plan(seconds: list[float], tier: Tier, batch_size: int) -> tuple[list[int], int]:
    """Plan a launch: the number of runs in a turn of each side, and the number of rounds.

    `seconds` has the time of one run of each side, the candidate first. A launch takes its share of
    the tier's seconds, or longer if its share of a scenario's queries needs that.
    """
    runs, round_s = rounds.fill(seconds)
    count = max(1, round(tier.seconds / tier.launches / round_s))
    p99 = tier.queries >= stats.fewest_queries(0.99)
    if batch_size == SINGLE_STREAM or (batch_size == MULTI_STREAM and p99):
        count = max(count, math.ceil(tier.queries / tier.launches / (2 * runs[0])))
    return runs, count


def summarize(launches: list[Launch], batch_size: int, sessions: list[dict]) -> dict:
    """Compute the timing columns of results.csv for one batch size.

    Latency is in milliseconds for a batch, throughput in images per second. `sessions` describes
    the sessions, to which the launches belong by number.
    """
    ours = [launch.times["candidate"] for launch in launches]
    everything = [times for launch in launches for times in launch.discarded]
    samples = np.concatenate([times for kept in ours for times in kept] + everything)
    p90 = stats.percentile_bound(samples, 0.90) if batch_size == SINGLE_STREAM else None
    p99 = stats.percentile_bound(samples, 0.99) if batch_size == MULTI_STREAM else None
    groups = [launch.session for launch in launches]
    columns = {
        **_estimate("latency_ms_p50", "latency_ms", _medians(ours), groups),
        "latency_ms_mean": float(samples.mean()),
        "latency_ms_std": float(samples.std(ddof=1)),
        "latency_ms_p90": stats.percentile(samples, 90),
        "latency_ms_p95": stats.percentile(samples, 95),
        "latency_ms_p99": stats.percentile(samples, 99),
        "single_stream_p90_ms": p90,
        "multi_stream_p99_ms": p99,
        "throughput_ips": float(1e3 * batch_size / samples.mean()),
        "n_timed": len(samples),
        "n_sessions": len(sessions),
        "n_launches": len(launches),
        "n_rounds": sum(map(len, ours)),
        "n_repeated": sum(launch.repeated for launch in launches),
        "contended": any(launch.contended for launch in launches),
    }
    for side, name in SPEEDUPS.items():
        if side in launches[0].times:
            theirs = [launch.times[side] for launch in launches]
            columns |= _estimate(name, name, _ratios(theirs, ours), groups)
            columns[MILLISECONDS[side]] = stats.grouped_mean(_medians(theirs), groups)
    for name in launches[0].cost:
        columns[name] = float(np.median([launch.cost[name] for launch in launches]))
    return columns | stored(launches) | {"sessions": sessions}


def stored(launches: list[Launch]) -> dict:
    """Return the launches as keys of a run's JSON, from which `launches_of` restores them.

    Samples of a side that is the same process as an earlier one are not stored again.
    """
    kept = {key: [] for key in SAMPLES.values()} | {"discarded_ms": [], "launches": []}
    for launch in launches:
        seen = {}
        facts = {"session": launch.session, "repeated": launch.repeated}
        facts |= {"contended": launch.contended, **launch.cost, "same_as": {}}
        for side, key in SAMPLES.items():
            times = launch.times.get(side)
            if times is None or id(times) in seen:
                facts["same_as"][side] = seen.get(id(times))
            else:
                seen[id(times)] = side
                kept[key].append(times)
        kept["discarded_ms"].append(launch.discarded)
        kept["launches"].append(facts)
    return kept


def launches_of(entry: dict) -> list[Launch]:
    """Restore the launches of an entry of a record's `timing`, which `stored` described."""
    samples = {side: iter(entry[key]) for side, key in SAMPLES.items()}
    launches = []
    for facts, discarded in zip(entry["launches"], entry["discarded_ms"], strict=True):
        facts, times = dict(facts), {}
        same_as = facts.pop("same_as")
        for side in SAMPLES:
            if side not in same_as:
                times[side] = next(samples[side])
            elif same_as[side] is not None:
                times[side] = times[same_as[side]]
        how = {name: facts.pop(name) for name in ("session", "repeated", "contended")}
        launches.append(Launch(times, cost=facts, discarded=discarded, **how))
    return launches


def _medians(launches: list[list[list[float]]]) -> list[float]:
    """Compute the time of a run in each launch: the median over rounds of the round's median."""
    return [float(np.median([np.median(times) for times in kept])) for kept in launches]


def _ratios(fp32: list[list[list[float]]], candidate: list[list[list[float]]]) -> list[float]:
    """Compute the median over each launch's rounds of FP32's time divided by the candidate's."""
    return [
        float(np.median([np.median(a) / np.median(b) for a, b in zip(*launch, strict=True)]))
        for launch in zip(fp32, candidate, strict=True)
    ]


def _estimate(name: str, prefix: str, values: list[float], groups: list[int]) -> dict:
    """Return the column `name`, and its interval as `prefix`_ci_low and `prefix`_ci_high."""
    low, high = stats.interval(values, groups)
    mean = stats.grouped_mean(values, groups)
    return {name: mean, f"{prefix}_ci_low": low, f"{prefix}_ci_high": high}


def _milliseconds(seconds: list[float]) -> list[float]:
    """Convert seconds to milliseconds, rounded as in a run's JSON."""
    return [round(1e3 * value, 4) for value in seconds]
