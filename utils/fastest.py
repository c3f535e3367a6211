"""Which engine runs an FP32 network fastest on this machine: found once for each checkpoint, threads and batch size, and kept."""

import contextlib
import json
from pathlib import Path

import numpy as np

from utils import backends, checkpoints, environment, paths, progress, rounds
from utils.checkpoints import Checkpoint
from utils.data import Split
from utils.worker import Worker

ENGINES = ("native", "frozen", "compile", "onnxruntime")
SEARCH_S, MIN_ROUNDS, MAX_ROUNDS = 3.0, 3, 20  # of a batch size, all engines together


def find(baseline: Checkpoint, split: Split, batch_sizes: list[int], threads: int, args) -> dict[int, dict]:
    """For each batch size `best_fp32`, the name of the fastest engine, and `fp32_ms`, the median of each engine.

    The first search is stored beside the checkpoint, so that all that is compared with this baseline is compared with the same.
    An engine that cannot run here is left out, and named in `fp32_missing`. A smoke run looks for nothing and takes eager FP32.
    """
    if args.smoke:
        return {size: {"best_fp32": "native", "fp32_ms": {}, "fp32_missing": {}} for size in batch_sizes}
    missing = {name: reason for name in ENGINES if (reason := backends.get(name).problem(args.device))}
    names = [name for name in ENGINES if name not in missing]
    facts = {"sha256": baseline.sha256, "cpu": environment.cpu()[0], "versions": environment.versions(), "engines": names}
    where = {"device": args.device, "threads": threads, "cuda_graph": args.cuda_graph}
    key = checkpoints.fingerprint(**facts, **where, rounds=SEARCH_S)
    stored = _read(path := baseline.path.with_suffix(".fastest.json"))
    found = stored.setdefault(key, where | {"batch_sizes": {}})["batch_sizes"]
    if wanted := [size for size in batch_sizes if str(size) not in found]:
        progress.say(f"looking for the fastest FP32 with {threads} threads among {', '.join(names)}")
        found |= {str(size): medians for size, medians in _search(names, baseline, split, wanted, threads, args).items()}
        paths.write_text(path, json.dumps(stored, indent=1) + "\n")
    return {
        size: {"best_fp32": min(found[str(size)], key=found[str(size)].get), "fp32_ms": found[str(size)], "fp32_missing": missing}
        for size in batch_sizes
    }


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _search(names: list[str], baseline: Checkpoint, split: Split, batch_sizes: list[int], threads: int, args) -> dict:
    """Median milliseconds of each engine at each batch size."""
    found = {}
    with contextlib.ExitStack() as stack, progress.Bar("fastest FP32", len(batch_sizes), "batch sizes") as bar:
        sides = [stack.enter_context(Worker(name, baseline.path, args.device, threads, args.cuda_graph)) for name in names]
        for size in sorted(batch_sizes):
            rounds.hold(sides, split, size)
            runs, round_s = rounds.fill([rounds.warm_up(side) for side in sides])
            kept, _, _ = rounds.alternate(rounds.turns(sides, runs), min(MAX_ROUNDS, max(MIN_ROUNDS, round(SEARCH_S / round_s))))
            medians = [float(1e3 * np.median([np.median(own[side]) for own in kept])) for side in range(len(sides))]
            found[size] = dict(zip(names, medians, strict=True))
            bar.step(note=f"batch {size}: {min(found[size], key=found[size].get)}")
    return found
