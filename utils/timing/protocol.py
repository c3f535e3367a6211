"""Time inference by the protocol `palindromic-rounds`, the same for every backend.

The candidate, eager FP32 and the fastest FP32 of this machine are each loaded in a fresh process
with a fixed number of threads. The thread that calls the network runs on the same CPU in each.
After a warm-up the processes take turns in short rounds, first in one order and then backwards
(A B C C B A), so that a machine that slows down or speeds up affects all of them equally. If the
two turns of one side differ too much, something else was running, and the round is repeated.

Then all processes are started again, several times. A process is some percent faster or slower for
as long as it lives, depending on where its memory happens to lie. More rounds cannot show this
(Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time"). The latency of a launch is
the median over its rounds, and its speed-up the median of the ratios within its rounds. Reported
figures are means over launches, with intervals bootstrapped over launches. With `--cuda-graph` all
sides run as CUDA graphs, including "eager" FP32, and the protocol's name says so.

The scenarios come from MLPerf inference (Reddi et al. 2020, arXiv:1911.02549; rules in
mlcommons/inference_policies), with fewer queries and without its audit, so these are not MLPerf
results. SingleStream: a batch of 1, sent when the previous one is answered, p90. MultiStream: a
batch of 8, p99. Offline: the throughput at the best batch size.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import progress, stats
from utils.cli import Options
from utils.data.dataset import Split
from utils.timing import fastest, rounds
from utils.timing.worker import Worker
from utils.training.checkpoints import Checkpoint

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


@dataclass
class Launch:
    """Times of one launch of all processes: seconds of every run, by round, for each side."""

    candidate: list[list[float]]
    eager: list[list[float]]
    best: list[list[float]]  # the same object as `eager` if eager FP32 is the fastest
    repeated: int  # number of contended rounds
    contended: bool  # whether contended rounds had to be kept
    cost: dict[str, float]  # of the candidate, from `Worker.call("cost")`


def measure(
    candidate: tuple[str, Path], baseline: Checkpoint, split: Split, options: Options
) -> list[dict]:
    """Measure latency and throughput of a candidate, given as (backend, artifact).

    Returns columns of results.csv, one dict for each number of threads and batch size. Every batch
    size is timed with all threads, and the smallest also with one thread, unless the tier is brief.
    Images come from `split`. Batch sizes ascend, so that the peak memory after each is the peak of
    that batch size. A smoke run times two rounds of one run each, with all threads only.
    """
    sizes = sorted(options.batch_sizes)
    launches, sweep = 1, {options.threads: sizes}
    if not options.smoke:
        tier = TIERS[options.timing]
        launches = tier.launches
        if tier.single:
            sweep = {1: sizes[:1]} | sweep
    entries = []
    with progress.Bar("timing", launches * sum(map(len, sweep.values())), "batch sizes") as bar:
        for threads, batch_sizes in sweep.items():
            here = options.replace(threads=threads)
            best = fastest.find(baseline, split, batch_sizes, here)
            names = {size: engines["best_fp32"] for size, engines in best.items()}
            collected: dict[int, list[Launch]] = {size: [] for size in batch_sizes}
            for _ in range(launches):
                for size, launch in _launch(candidate, baseline, split, names, here):
                    collected[size].append(launch)
                    bar.step(note=f"batch {size}, {threads} threads")
            for size in batch_sizes:
                entry = {"threads": threads, "batch_size": size}
                entry |= {"protocol": options.protocol, "tier": options.tier}
                entries.append(entry | summarize(collected[size], size) | best[size])
    for entry in entries:
        entry["offline_ips"] = None
    fastest_entry = max(entries, key=lambda entry: entry["throughput_ips"])
    fastest_entry["offline_ips"] = fastest_entry["throughput_ips"]
    return entries


def _launch(
    candidate: tuple[str, Path],
    baseline: Checkpoint,
    split: Split,
    best: dict[int, str],
    options: Options,
) -> Iterator[tuple[int, Launch]]:
    """Start all processes once; yields each batch size of `best` and its `Launch`.

    `best` maps a batch size to the name of its fastest FP32 engine.
    """
    how = options.device, options.threads, options.cuda_graph
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker(*candidate, *how))
        fp32 = {
            name: stack.enter_context(Worker(name, baseline.path, *how))
            for name in dict.fromkeys(["native", *best.values()])
        }
        for size, name in best.items():
            sides = [ours, fp32["native"]]
            if name != "native":
                sides.append(fp32[name])
            yield size, _time(sides, split, size, options)


def _time(sides: list[Worker], split: Split, batch_size: int, options: Options) -> Launch:
    """Time `sides`: the candidate, eager FP32 and the fastest FP32, if it is another engine."""
    rounds.hold(sides, split, batch_size)
    if options.smoke:
        runs, count = [1] * len(sides), 2
    else:
        seconds = [rounds.warm_up(side) for side in sides]
        runs, count = plan(seconds, TIERS[options.timing], batch_size)
    kept, repeated, contended = rounds.alternate(rounds.turns(sides, runs), count)
    times = [list(side) for side in zip(*kept, strict=True)]
    cost = sides[0].call("cost")
    return Launch(times[0], times[1], times[-1], repeated, contended, cost)


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


def summarize(launches: list[Launch], batch_size: int) -> dict:
    """Compute the timing columns of results.csv for one batch size.

    Latency is in milliseconds for a batch, throughput in images per second.
    """
    candidate = [launch.candidate for launch in launches]
    eager = [launch.eager for launch in launches]
    best = [launch.best for launch in launches]
    samples = 1e3 * np.concatenate([times for kept in candidate for times in kept])
    middle = by_launch(candidate)
    low, high = stats.mean_interval(middle)
    p90 = stats.percentile_bound(samples, 0.90) if batch_size == SINGLE_STREAM else None
    p99 = stats.percentile_bound(samples, 0.99) if batch_size == MULTI_STREAM else None
    columns = {
        "latency_ms_p50": float(middle.mean()),
        "latency_ms_ci_low": low,
        "latency_ms_ci_high": high,
        "latency_ms_mean": float(samples.mean()),
        "latency_ms_std": float(samples.std(ddof=1)),
        "latency_ms_p90": stats.percentile(samples, 90),
        "latency_ms_p95": stats.percentile(samples, 95),
        "latency_ms_p99": stats.percentile(samples, 99),
        "eager_fp32_ms": float(by_launch(eager).mean()),
        "best_fp32_ms": float(by_launch(best).mean()),
        "single_stream_p90_ms": p90,
        "multi_stream_p99_ms": p99,
        "throughput_ips": float(1e3 * batch_size / samples.mean()),
        **speedup("speedup_vs_eager_fp32", eager, candidate),
        **speedup("speedup_vs_best_fp32", best, candidate),
        "n_timed": len(samples),
        "n_launches": len(launches),
        "n_rounds": sum(map(len, candidate)),
        "n_repeated": sum(launch.repeated for launch in launches),
        "contended": any(launch.contended for launch in launches),
    }
    for name in launches[0].cost:
        columns[name] = float(np.median([launch.cost[name] for launch in launches]))
    others = [launch.best for launch in launches if launch.best is not launch.eager]
    columns["samples_ms"] = [milliseconds(kept) for kept in candidate]
    columns["eager_samples_ms"] = [milliseconds(kept) for kept in eager]
    columns["best_samples_ms"] = [milliseconds(kept) for kept in others]
    return columns


def by_launch(launches: list[list[list[float]]]) -> np.ndarray:
    """Compute the milliseconds of a run in each launch, float64 (launches,).

    This is the median over the launch's rounds of the median within each round.
    """
    return np.array([1e3 * np.median([np.median(times) for times in kept]) for kept in launches])


def speedup(name: str, fp32: list, candidate: list) -> dict[str, float]:
    """Compute how many times as fast as FP32 the candidate is, with an interval.

    `fp32` and `candidate` have the seconds of every run, by launch and round. Returns the columns
    `name`, `name`_ci_low and `name`_ci_high.
    """
    ratios = [_ratio(*launch) for launch in zip(fp32, candidate, strict=True)]
    low, high = stats.mean_interval(np.array(ratios))
    return {name: float(np.mean(ratios)), f"{name}_ci_low": low, f"{name}_ci_high": high}


def _ratio(fp32: list[list[float]], candidate: list[list[float]]) -> float:
    """Compute the median over a launch's rounds of FP32's time divided by the candidate's."""
    return np.median([np.median(a) / np.median(b) for a, b in zip(fp32, candidate, strict=True)])


def milliseconds(rounds: list[list[float]]) -> list[list[float]]:
    """Convert seconds by round to milliseconds, rounded as in a run's JSON."""
    return [[round(1e3 * value, 4) for value in times] for times in rounds]
