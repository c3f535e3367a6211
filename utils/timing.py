"""How long inference takes: the protocol `palindromic-rounds`, the same for every backend.

The candidate, eager FP32 and the fastest FP32 of this machine are each loaded in a fresh process with a fixed number of threads,
the one that calls the network on the same CPU in each. After a warm-up they take turns in short rounds, first in one order and
then backwards (A B C C B A), so that a machine that grows slower or faster does so to all of them. A round in which two turns
of a side differ too much is repeated: something else was running. Then all processes are started anew: where its memory happens
to lie makes a process faster or slower by some percent for as long as it lives, which no number of rounds would show (Kalibera
and Jones 2013, "Rigorous benchmarking in reasonable time"). Of each launch the medians over its rounds are taken, of a speed-up
those of the ratios within rounds; the figures are the means over launches, with intervals bootstrapped over launches. With
`--cuda-graph` all sides run as CUDA graphs, "eager" FP32 too, and the protocol's name says so.

Scenarios are those of MLPerf inference (Reddi et al. 2020, arXiv:1911.02549; rules in mlcommons/inference_policies), on fewer
queries and without its audit, so these are not MLPerf results: SingleStream is a batch of 1, the next sent when it is answered,
p90; MultiStream a batch of 8, p99; Offline the throughput at the best batch size.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import cli, fastest, progress, rounds, stats
from utils.checkpoints import Checkpoint
from utils.data import Split
from utils.worker import Worker

SINGLE_STREAM, MULTI_STREAM = 1, 8  # samples of a query


@dataclass(frozen=True)
class Tier:
    """How long to time: seconds of a row, all sides together, in so many launches, and fewest queries in a scenario."""

    seconds: float
    launches: int
    queries: int


# 64 and 662 are the fewest queries from which a p90 and a p99 can be estimated: see `stats.percentile_bound`.
TIERS = dict(zip(cli.TIMING, (Tier(10, 6, 64), Tier(60, 10, 662), Tier(600, 10, 662)), strict=True))


@dataclass
class Launch:
    """What one launch of the processes gave: seconds of every run, by round, of each side."""

    candidate: list[list[float]]
    eager: list[list[float]]
    best: list[list[float]]
    repeated: int  # rounds that were contended
    contended: bool  # and had to be kept
    cost: dict[str, float]


def measure(candidate: tuple[str, Path], baseline: Checkpoint, split: Split, args) -> list[dict]:
    """Latency and throughput of a candidate (backend, artifact), one entry for each number of threads and batch size.

    All batch sizes are timed with all threads, the smallest with one thread, too. Images come from `split`. Batch sizes ascend,
    so that the peak memory after each is the one it needs itself. A smoke run times two rounds of one run each, on all threads.
    """
    sizes = sorted(args.batch_sizes)
    sweep = {args.threads: sizes} if args.smoke else {1: sizes[:1]} | {args.threads: sizes}
    tier = None if args.smoke else TIERS[args.timing]
    launches, entries = tier.launches if tier else 1, []
    with progress.Bar("timing", launches * sum(map(len, sweep.values())), "batch sizes") as bar:
        for threads, batch_sizes in sweep.items():
            best = fastest.find(baseline, split, batch_sizes, threads, args)
            found: dict[int, list[Launch]] = {size: [] for size in batch_sizes}
            for _ in range(launches):
                names = {size: own["best_fp32"] for size, own in best.items()}
                for size, launch in _launch(candidate, baseline, split, names, threads, tier, args):
                    found[size].append(launch)
                    bar.step(note=f"batch {size}, {threads} threads")
            for size in batch_sizes:
                how = {"protocol": cli.protocol(args), "tier": "smoke" if args.smoke else args.timing}
                entries.append({"threads": threads, "batch_size": size} | how | summarize(found[size], size) | best[size])
    fastest_batch = max(entries, key=lambda entry: entry["throughput_ips"])
    return [entry | {"offline_ips": entry["throughput_ips"] if entry is fastest_batch else None} for entry in entries]


def _launch(candidate, baseline: Checkpoint, split: Split, best: dict[int, str], threads: int, tier: Tier | None, args):
    """Start all processes once and time every batch size in `best`; yields each with its `Launch`."""
    names = dict.fromkeys(["native", *best.values()])
    with contextlib.ExitStack() as stack:
        load = [candidate, *((name, baseline.path) for name in names)]
        own, *fp32 = [stack.enter_context(Worker(*what, args.device, threads, args.cuda_graph)) for what in load]
        engines = dict(zip(names, fp32, strict=True))
        for size, name in best.items():
            sides = list(dict.fromkeys([own, engines["native"], engines[name]]))
            rounds.hold(sides, split, size)
            runs, planned = plan([rounds.warm_up(side) for side in sides], tier, size) if tier else ([1] * len(sides), 2)
            kept, repeated, contended = rounds.alternate(rounds.turns(sides, runs), planned)
            times = {side: [times[place] for times in kept] for place, side in enumerate(sides)}
            compared = times[own], times[engines["native"]], times[engines[name]]
            yield size, Launch(*compared, repeated, contended, own.call("cost"))


def plan(seconds: list[float], tier: Tier, batch_size: int) -> tuple[list[int], int]:
    """Runs a turn for each side, and rounds of a launch, from the seconds of one run of each; the candidate first."""
    runs, round_s = rounds.fill(seconds)
    p99 = tier.queries >= stats.fewest_queries(0.99)
    queries = tier.queries if batch_size == SINGLE_STREAM or (batch_size == MULTI_STREAM and p99) else 0
    return runs, max(1, round(tier.seconds / tier.launches / round_s), math.ceil(queries / tier.launches / (2 * runs[0])))


def summarize(launches: list[Launch], batch_size: int) -> dict:
    """Figures of one batch size. Latency is of a batch, throughput of images."""
    samples = 1e3 * np.concatenate([run for launch in launches for run in launch.candidate])
    middle = np.array([1e3 * np.median([np.median(own) for own in launch.candidate]) for launch in launches])
    low, high = stats.mean_interval(middle)
    scenarios = {"single_stream_p90_ms": (SINGLE_STREAM, 0.90), "multi_stream_p99_ms": (MULTI_STREAM, 0.99)}
    return {
        "latency_ms_p50": float(middle.mean()),
        "latency_ms_ci_low": low,
        "latency_ms_ci_high": high,
        "latency_ms_mean": float(samples.mean()),
        "latency_ms_std": float(samples.std(ddof=1)),
        **{f"latency_ms_p{q}": float(np.percentile(samples, q)) for q in (90, 95, 99)},
        **{key: stats.percentile_bound(samples, q) if batch_size == n else None for key, (n, q) in scenarios.items()},
        "throughput_ips": float(1e3 * batch_size / samples.mean()),
        **speedup("speedup_vs_eager_fp32", [(launch.eager, launch.candidate) for launch in launches]),
        **speedup("speedup_vs_best_fp32", [(launch.best, launch.candidate) for launch in launches]),
        "n_timed": len(samples),
        "n_launches": len(launches),
        "n_rounds": sum(len(launch.candidate) for launch in launches),
        "n_repeated": sum(launch.repeated for launch in launches),
        "contended": any(launch.contended for launch in launches),
        **{key: float(np.median([launch.cost[key] for launch in launches])) for key in launches[0].cost},
        "samples_ms": [milliseconds(launch.candidate) for launch in launches],
        "eager_samples_ms": [milliseconds(launch.eager) for launch in launches],
        "best_samples_ms": [milliseconds(launch.best) for launch in launches if launch.best is not launch.eager],
    }


def speedup(name: str, launches: list[tuple[list, list]]) -> dict[str, float]:
    """How many times faster than a reference, from the (reference's, candidate's) rounds of each launch, with its interval."""
    ratios = [
        np.median([np.median(reference) / np.median(own) for reference, own in zip(*pair, strict=True)]) for pair in launches
    ]
    low, high = stats.mean_interval(np.array(ratios))
    return {name: float(np.mean(ratios)), f"{name}_ci_low": low, f"{name}_ci_high": high}


def milliseconds(rounds: list[list[float]]) -> list[list[float]]:
    """Seconds by round as they are stored."""
    return [[round(1e3 * value, 4) for value in own] for own in rounds]
