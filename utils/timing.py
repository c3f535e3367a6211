"""How long inference takes: the protocol `interleaved-rounds`, the same for every backend.

The candidate and eager FP32 are each loaded in a fresh process with a fixed number of threads. After a warm-up they take turns
in short rounds, so that a machine that slows down slows both, and a speed-up is the median of ratios within rounds. The
intervals are bootstrapped over rounds, which are nearer to independent than the runs within one.
"""

import math
import time
from pathlib import Path

import numpy as np

from utils import progress, stats
from utils.data import Split
from utils.worker import Worker

PROTOCOL = "interleaved-rounds/1"
WARMUP_S, WARMUP_RUNS = 0.5, 3
ROUND_S = 0.1  # each side's share of a round
BUDGET_S = 6.0  # for a batch size, both sides together
MIN_ROUNDS, MAX_ROUNDS = 5, 30
NOT_TIMED = {"batch_size": None}  # the entry of a simulated backend, whose speed says nothing
CONTENDED = 1.2  # a spread of the rounds' medians above this means that something else was running


def measure(
    candidate: tuple[str, Path], baseline: tuple[str, Path], split: Split, batch_sizes: tuple[int, ...], args
) -> list[dict]:
    """Latency and throughput of a candidate (backend, artifact) beside the FP32 baseline, one entry for each batch size.

    Images come from `split`. Batch sizes ascend, so that the peak memory after each is the one it needs itself. A smoke run
    times two rounds of one run each.
    """
    entries = []
    sides = [Worker(backend, path, args.device, args.threads) for backend, path in (candidate, baseline)]
    with sides[0], sides[1], progress.Bar("timing", len(batch_sizes), "batch sizes") as bar:
        for batch_size in sorted(batch_sizes):
            entries.append(_one(sides, split, batch_size, args.smoke))
            bar.step(note=f"batch {batch_size}: {entries[-1]['latency_ms_p50']:.2f} ms")
    return entries


def _one(sides: list[Worker], split: Split, batch_size: int, smoke: bool) -> dict:
    for side in sides:
        side.send("hold", split, batch_size)
    for side in sides:
        side.receive()
    runs, rounds = ([1, 1], 2) if smoke else plan([_warm_up(side) for side in sides])
    times: list[list[list[float]]] = [[], []]
    for number in range(rounds):
        for own in (0, 1) if number % 2 == 0 else (1, 0):
            times[own].append(sides[own].call("time", runs[own]))
    return {"protocol": PROTOCOL, "batch_size": batch_size, **summarize(*times, batch_size), **sides[0].call("cost")}


def _warm_up(side: Worker) -> float:
    """Run until caches, clocks and just-in-time compilers have settled; returns the median seconds of a run."""
    seconds, started = [], time.perf_counter()
    while len(seconds) < WARMUP_RUNS or time.perf_counter() - started < WARMUP_S:
        seconds += side.call("time", 1)
    return float(np.median(seconds))


def plan(seconds: list[float]) -> tuple[list[int], int]:
    """Runs a round for each side, and rounds, from the seconds that one run of each side takes."""
    runs = [max(1, math.ceil(ROUND_S / own)) for own in seconds]
    round_s = sum(n * own for n, own in zip(runs, seconds, strict=True))
    return runs, max(MIN_ROUNDS, min(MAX_ROUNDS, round(BUDGET_S / round_s)))


def summarize(candidate: list[list[float]], baseline: list[list[float]], batch_size: int) -> dict:
    """Figures of one batch size from the seconds of every run, by round. Latency is of a batch, throughput of images."""
    samples = np.concatenate([np.asarray(own) for own in candidate])
    medians = np.array([np.median(own) for own in candidate])
    ratios = np.array([np.median(own) for own in baseline]) / medians
    low, high = stats.median_interval(medians)
    ratio_low, ratio_high = stats.median_interval(ratios)
    percentiles = {f"latency_ms_p{q}": float(1e3 * np.percentile(samples, q)) for q in (50, 90, 95, 99)}
    return {
        "latency_ms_mean": float(1e3 * samples.mean()),
        **percentiles,
        "latency_ms_std": float(1e3 * samples.std(ddof=1)) if len(samples) > 1 else 0.0,
        "latency_ms_ci_low": 1e3 * low,
        "latency_ms_ci_high": 1e3 * high,
        "throughput_ips": float(batch_size / samples.mean()),
        "speedup_vs_eager_fp32": float(np.median(ratios)),
        "speedup_vs_eager_fp32_ci_low": ratio_low,
        "speedup_vs_eager_fp32_ci_high": ratio_high,
        "n_timed": len(samples),
        "n_rounds": len(candidate),
        "contended": bool(medians.max() / medians.min() > CONTENDED),
        "samples_ms": [[round(1e3 * value, 5) for value in own] for own in candidate],
        "baseline_samples_ms": [[round(1e3 * value, 5) for value in own] for own in baseline],
    }
