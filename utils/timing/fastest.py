"""Find the engine that runs an FP32 network fastest on this machine, and remember it."""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
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
TOO_SLOW = "left out of brief timing, because it compiles for half a minute"

Medians = dict[str, float]  # milliseconds of a batch, by engine


def find(
    baseline: Checkpoint, split: Split, batch_sizes: list[int], options: Options
) -> dict[int, dict]:
    """Find the fastest FP32 engine for each of `batch_sizes`.

    Returns for each batch size `best_fp32` (name of the fastest engine), `fp32_ms` (median
    milliseconds of each engine) and `fp32_missing` (the engines for this device that cannot run
    here, and why). The first search is stored next to the checkpoint, so that all candidates are
    compared with the same engine. Brief timing leaves out the engines that compile when they load.
    A smoke run searches nothing and takes eager FP32.
    """
    if options.smoke:
        return {
            size: {"best_fp32": "native", "fp32_ms": {}, "fp32_missing": {}} for size in batch_sizes
        }
    names, missing = _engines(options)
    facts = _facts(baseline, names, options)
    path = baseline.path.with_suffix(".fastest")
    known = _known(_read(path), facts)
    if wanted := [size for size in batch_sizes if size not in known]:
        progress.say(
            f"looking for the fastest FP32 with {options.threads} threads among {', '.join(names)}"
        )
        known = _remember(path, facts, _search(names, baseline, split, wanted, options))
    return {
        size: {
            "best_fp32": min(known[size], key=known[size].get),
            "fp32_ms": known[size],
            "fp32_missing": missing,
        }
        for size in batch_sizes
    }


def _engines(options: Options) -> tuple[list[str], dict[str, str]]:
    """Return the engines to compare, and why the others for this device are missing, by name."""
    names, missing = [], {}
    for name in ENGINES:
        if options.device not in BACKENDS[name].devices:
            continue
        if reason := registry.problem(name, options.device):
            missing[name] = reason
        elif options.timing == "brief" and BACKENDS[name].compiles:
            missing[name] = TOO_SLOW
        else:
            names.append(name)
    return names, missing


def _facts(baseline: Checkpoint, names: list[str], options: Options) -> dict:
    """Return everything that decides the outcome of a search among the engines `names`."""
    modules = [f"utils.backends.{BACKENDS[name].module}" for name in names]
    return {
        "sha256": baseline.sha256,
        "cpu": environment.cpu(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "versions": environment.versions(),
        "engines": names,
        "device": options.device,
        "threads": options.threads,
        "cuda_graph": options.cuda_graph,
        "seconds": rounds.SEARCH_S,
        "code": environment.code_of("utils.timing.fastest", *modules),
    }


def _known(stored: dict, facts: dict) -> dict[int, Medians]:
    """Return the medians of earlier searches with equal `facts`, by batch size."""
    entry = stored.get(checkpoints.fingerprint(**facts), {"batch_sizes": {}})
    return {int(size): medians for size, medians in entry["batch_sizes"].items()}


def _remember(path: Path, facts: dict, searched: dict[int, Medians]) -> dict[int, Medians]:
    """Add the medians of a search to the file at `path`; returns all medians for `facts`.

    Another script may have searched in the meantime. Its medians take precedence, because it
    already compares with them.
    """
    with FileLock(path.with_suffix(".lock")):
        stored = _read(path)
        known = searched | _known(stored, facts)
        entry = {name: facts[name] for name in ("device", "threads", "cuda_graph")}
        entry["batch_sizes"] = {str(size): medians for size, medians in known.items()}
        stored[checkpoints.fingerprint(**facts)] = entry
        checksums.write(path, json.dumps(stored, indent=1).encode())
    return known


def _read(path: Path) -> dict:
    content = checksums.read(path)
    return {} if content is None else json.loads(content)


def _search(
    names: list[str], baseline: Checkpoint, split: Split, batch_sizes: list[int], options: Options
) -> dict[int, Medians]:
    """Time each of the engines `names` for each batch size."""
    medians = {}
    how = options.device, options.threads, options.cuda_graph
    with (
        contextlib.ExitStack() as stack,
        progress.Bar("fastest FP32", len(batch_sizes), "batch sizes") as bar,
    ):
        sides = [stack.enter_context(Worker(name, baseline.path, *how)) for name in names]
        for size in sorted(batch_sizes):
            ms = 1e3 * np.median(rounds.compare(sides, split, size), axis=0)
            medians[size] = dict(zip(names, ms.tolist(), strict=True))
            bar.step(note=f"batch {size}: {min(medians[size], key=medians[size].get)}")
    return medians
