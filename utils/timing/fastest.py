"""Find the engine that runs an FP32 network fastest on this machine, and remember it."""

import contextlib
import json
from pathlib import Path

import numpy as np
from filelock import FileLock

from utils import checksums, environment, progress
from utils.backends import registry
from utils.catalog import BACKENDS
from utils.cli import Options
from utils.data.dataset import Split
from utils.timing import rounds
from utils.timing.worker import Worker
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoint

ENGINES = (
    "native",
    *(name for name, backend in BACKENDS.items() if backend.fp32 and name != "native"),
)


def find(
    baseline: Checkpoint, split: Split, batch_sizes: list[int], options: Options
) -> dict[int, dict]:
    """Find the fastest FP32 engine for each of `batch_sizes`.

    Returns for each batch size `best_fp32` (name of the fastest engine), `fp32_ms` (median
    milliseconds of each engine) and `fp32_missing` (the engines for this device that cannot run
    here, and why). The first search is stored beside the checkpoint, so every candidate is compared
    with the same engine. Brief timing leaves out the engines that compile when they load. A smoke
    run searches nothing and takes eager FP32.
    """
    if options.smoke:
        return {
            size: {"best_fp32": "native", "fp32_ms": {}, "fp32_missing": {}} for size in batch_sizes
        }
    able = [name for name in ENGINES if options.device in BACKENDS[name].devices]
    missing = {name: reason for name in able if (reason := registry.problem(name, options.device))}
    if options.timing == "brief":
        left_out = "left out of brief timing, as it compiles for half a minute"
        missing = {name: left_out for name in able if BACKENDS[name].compiles} | missing
    names = [name for name in able if name not in missing]
    facts = {
        "sha256": baseline.sha256,
        "cpu": environment.cpu()[0],
        "versions": environment.versions(),
        "engines": names,
    }
    where = {"device": options.device, "threads": options.threads, "cuda_graph": options.cuda_graph}
    key = checkpoints.fingerprint(**facts, **where, rounds=rounds.SEARCH_S)
    stored = _read(path := baseline.path.with_suffix(".fastest"))
    known = stored.setdefault(key, where | {"batch_sizes": {}})["batch_sizes"]
    if wanted := [size for size in batch_sizes if str(size) not in known]:
        progress.say(
            f"looking for the fastest FP32 with {options.threads} threads among {', '.join(names)}"
        )
        medians = {
            str(size): each
            for size, each in _search(names, baseline, split, wanted, options).items()
        }
        with FileLock(path.with_suffix(".lock")):  # another script may have searched meanwhile
            stored = _read(path)
            known = stored.setdefault(key, where | {"batch_sizes": {}})["batch_sizes"]
            known |= medians | known
            checksums.write(path, json.dumps(stored, indent=1).encode())
    return {
        size: {
            "best_fp32": min(known[str(size)], key=known[str(size)].get),
            "fp32_ms": known[str(size)],
            "fp32_missing": missing,
        }
        for size in batch_sizes
    }


def _read(path: Path) -> dict:
    content = checksums.read(path)
    return {} if content is None else json.loads(content)


def _search(
    names: list[str], baseline: Checkpoint, split: Split, batch_sizes: list[int], options: Options
) -> dict:
    """Time each engine; returns {batch size: {engine: median milliseconds of a batch}}."""
    medians = {}
    how = options.device, options.threads, options.cuda_graph
    with (
        contextlib.ExitStack() as stack,
        progress.Bar("fastest FP32", len(batch_sizes), "batch sizes") as bar,
    ):
        sides = [stack.enter_context(Worker(name, baseline.path, *how)) for name in names]
        for size in sorted(batch_sizes):
            seconds = np.median(rounds.compare(sides, split, size), axis=0)
            medians[size] = {
                name: 1e3 * float(each) for name, each in zip(names, seconds, strict=True)
            }
            bar.step(note=f"batch {size}: {min(medians[size], key=medians[size].get)}")
    return medians
