"""Time inference by the protocol `palindromic-rounds`, the same for every backend.

The candidate, eager FP32 and the fastest FP32 of this machine are each loaded in a fresh process
with a fixed number of threads. The thread that calls the network runs on the same CPU in each.
After a warm-up the processes take turns in short rounds, first in one order and then backwards
(A B C C B A), so that a machine that slows down or speeds up affects all of them. If the two turns
of one side differ too much, something else was running, and the round is repeated.

Then all processes are started again, several times. A process is some percent faster or slower for
as long as it lives, depending on where its memory happens to lie; no number of rounds would show
that (Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time"). A launch yields the
median over its rounds; for a speed-up, the median of the ratios within rounds. The reported figures
are means over launches, with intervals bootstrapped over launches. With `--cuda-graph` all sides
run as CUDA graphs, "eager" FP32 too, and the protocol's name says so.

The scenarios are those of MLPerf inference (Reddi et al. 2020, arXiv:1911.02549; rules in
mlcommons/inference_policies), with fewer queries and without its audit, so these are not MLPerf
results. SingleStream: a batch of 1, sent when the previous one is answered, p90. MultiStream: a
batch of 8, p99. Offline: the throughput at the best batch size.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import cli, progress, stats
from utils.cli import Options
from utils.data.dataset import Split
from utils.timing import fastest, rounds
from utils.timing.worker import Worker
from utils.training.checkpoints import Checkpoint

SINGLE_STREAM, MULTI_STREAM = 1, 8  # images in a query


@dataclass(frozen=True)
class Tier:
    """How long to time one row.

    `seconds` is the time of all sides and launches together, `queries` the smallest number of
    candidate runs for a scenario. With `single`, the smallest batch size is timed with one thread,
    too.
    """

    seconds: float
    launches: int
    queries: int
    single: bool = True


# A p90 needs at least 64 queries, a p99 at least 662: see `stats.percentile_bound`.
TIERS = dict(
    zip(
        cli.TIMING,
        (Tier(3, 3, 64, single=False), Tier(10, 6, 64), Tier(60, 10, 662), Tier(600, 10, 662)),
        strict=True,
    )
)


@dataclass
class Launch:
    """Times of one launch of all processes: seconds of every run, by round, for each side."""

    candidate: list[list[float]]
    eager: list[list[float]]
    best: list[list[float]]
    repeated: int  # number of contended rounds
    contended: bool  # whether contended rounds had to be kept
    cost: dict[str, float]  # of the candidate, from `Worker.call("cost")`


def measure(
    candidate: tuple[str, Path], baseline: Checkpoint, split: Split, options: Options
) -> list[dict]:
    """Measure latency and throughput of a candidate, given as (backend, artifact).

    Returns columns of results.csv, one dict for each number of threads and batch size. Every batch
    size is timed with all threads; the smallest with one thread, too, unless the tier is brief.
    Images come from `split`. Batch sizes ascend, so that the peak memory after each is the peak of
    that batch size. A smoke run times two rounds of one run each, with all threads only.
    """
    sizes = sorted(options.batch_sizes)
    tier = None if options.smoke else TIERS[options.timing]
    sweep = ({1: sizes[:1]} if tier and tier.single else {}) | {options.threads: sizes}
    launches, entries = tier.launches if tier else 1, []
    with progress.Bar("timing", launches * sum(map(len, sweep.values())), "batch sizes") as bar:
        for threads, batch_sizes in sweep.items():
            here = options.replace(threads=threads)
            best = fastest.find(baseline, split, batch_sizes, here)
            collected: dict[int, list[Launch]] = {size: [] for size in batch_sizes}
            for _ in range(launches):
                names = {size: engines["best_fp32"] for size, engines in best.items()}
                for size, launch in _launch(candidate, baseline, split, names, here):
                    collected[size].append(launch)
                    bar.step(note=f"batch {size}, {threads} threads")
            for size in batch_sizes:
                how = {"protocol": options.protocol, "tier": options.tier}
                entries.append(
                    {"threads": threads, "batch_size": size}
                    | how
                    | summarize(collected[size], size)
                    | best[size]
                )
    fastest_batch = max(entries, key=lambda entry: entry["throughput_ips"])
    return [
        entry | {"offline_ips": entry["throughput_ips"] if entry is fastest_batch else None}
        for entry in entries
    ]


def _launch(
    candidate: tuple[str, Path],
    baseline: Checkpoint,
    split: Split,
    best: dict[int, str],
    options: Options,
):
    """Start all processes once; yields the `Launch` of each batch size in `best`.

    `best` maps a batch size to the name of its fastest FP32 engine.
    """
    tier = None if options.smoke else TIERS[options.timing]
    names = dict.fromkeys(["native", *best.values()])
    how = options.device, options.threads, options.cuda_graph
    with contextlib.ExitStack() as stack:
        load = [candidate, *((name, baseline.path) for name in names)]
        ours, *fp32 = [stack.enter_context(Worker(*what, *how)) for what in load]
        engines = dict(zip(names, fp32, strict=True))
        for size, name in best.items():
            sides = list(dict.fromkeys([ours, engines["native"], engines[name]]))
            rounds.hold(sides, split, size)
            runs, planned = (
                plan([rounds.warm_up(side) for side in sides], tier, size)
                if tier
                else ([1] * len(sides), 2)
            )
            kept, repeated, contended = rounds.alternate(rounds.turns(sides, runs), planned)
            times = {side: [times[place] for times in kept] for place, side in enumerate(sides)}
            compared = times[ours], times[engines["native"]], times[engines[name]]
            yield size, Launch(*compared, repeated, contended, ours.call("cost"))


def plan(seconds: list[float], tier: Tier, batch_size: int) -> tuple[list[int], int]:
    """Plan a launch: the number of runs in a turn of each side, and the number of rounds.

    `seconds` has the time of one run of each side, the candidate first. A launch takes its share of
    the tier's seconds, or longer if its share of a scenario's queries needs that.
    """
    runs, round_s = rounds.fill(seconds)
    p99 = tier.queries >= stats.fewest_queries(0.99)
    queries = (
        tier.queries if batch_size == SINGLE_STREAM or (batch_size == MULTI_STREAM and p99) else 0
    )
    return runs, max(
        1,
        round(tier.seconds / tier.launches / round_s),
        math.ceil(queries / tier.launches / (2 * runs[0])),
    )


def summarize(launches: list[Launch], batch_size: int) -> dict:
    """Compute the timing columns of results.csv for one batch size.

    Latency is in milliseconds for a batch, throughput in images per second.
    """
    samples = 1e3 * np.concatenate([times for launch in launches for times in launch.candidate])
    middle = by_launch([launch.candidate for launch in launches])
    low, high = stats.mean_interval(middle)
    scenarios = {
        "single_stream_p90_ms": (SINGLE_STREAM, 0.90),
        "multi_stream_p99_ms": (MULTI_STREAM, 0.99),
    }
    return {
        "latency_ms_p50": float(middle.mean()),
        "latency_ms_ci_low": low,
        "latency_ms_ci_high": high,
        "latency_ms_mean": float(samples.mean()),
        "latency_ms_std": float(samples.std(ddof=1)),
        **{f"latency_ms_p{q}": stats.percentile(samples, q) for q in (90, 95, 99)},
        "eager_fp32_ms": float(by_launch([launch.eager for launch in launches]).mean()),
        "best_fp32_ms": float(by_launch([launch.best for launch in launches]).mean()),
        **{
            key: stats.percentile_bound(samples, q) if batch_size == n else None
            for key, (n, q) in scenarios.items()
        },
        "throughput_ips": float(1e3 * batch_size / samples.mean()),
        **speedup(
            "speedup_vs_eager_fp32", [(launch.eager, launch.candidate) for launch in launches]
        ),
        **speedup("speedup_vs_best_fp32", [(launch.best, launch.candidate) for launch in launches]),
        "n_timed": len(samples),
        "n_launches": len(launches),
        "n_rounds": sum(len(launch.candidate) for launch in launches),
        "n_repeated": sum(launch.repeated for launch in launches),
        "contended": any(launch.contended for launch in launches),
        **{
            key: float(np.median([launch.cost[key] for launch in launches]))
            for key in launches[0].cost
        },
        "samples_ms": [milliseconds(launch.candidate) for launch in launches],
        "eager_samples_ms": [milliseconds(launch.eager) for launch in launches],
        "best_samples_ms": [
            milliseconds(launch.best) for launch in launches if launch.best is not launch.eager
        ],
    }


def by_launch(launches: list[list[list[float]]]) -> np.ndarray:
    """Milliseconds of a run in each launch, float64 (launches,).

    This is the median over the launch's rounds of the median within each round.
    """
    return np.array([1e3 * np.median([np.median(times) for times in kept]) for kept in launches])


def speedup(name: str, launches: list[tuple[list, list]]) -> dict[str, float]:
    """Compute how many times faster the candidate is than a reference, with an interval.

    `launches` has a pair for each launch: the rounds of the reference and those of the candidate.
    Returns the columns `name`, `name`_ci_low and `name`_ci_high.
    """
    ratios = [
        np.median(
            [
                np.median(reference) / np.median(times)
                for reference, times in zip(*pair, strict=True)
            ]
        )
        for pair in launches
    ]
    low, high = stats.mean_interval(np.array(ratios))
    return {name: float(np.mean(ratios)), f"{name}_ci_low": low, f"{name}_ci_high": high}


def milliseconds(rounds: list[list[float]]) -> list[list[float]]:
    """Convert seconds by round to milliseconds, rounded as a run's JSON stores them."""
    return [[round(1e3 * value, 4) for value in times] for times in rounds]
