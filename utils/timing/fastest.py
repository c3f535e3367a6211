"""The study's comparison of all FP32 engines, whose winner every speed-up refers to.

For each number of threads and batch size, all engines take turns in the same rounds. The comparison
is a record of the study, `fp32_engines/MODEL_DEVICE.json`, and `fp32_engines.csv` has its rows. It
is made once per processor, so that all rows of a study have the same reference: a search per script
picked another engine on another day, and the two differed by up to 20 %.
"""

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from utils import environment, paths, progress, results, stats
from utils.backends import registry
from utils.catalog import BACKENDS
from utils.cli import TIMING, Options
from utils.errors import UserError
from utils.experiment import Experiment
from utils.timing import cores, rounds
from utils.timing.worker import Worker

ENGINES = (
    "native",
    *(name for name, backend in BACKENDS.items() if backend.fp32 and name != "native"),
)
TOO_SLOW = "left out of brief timing, because it compiles for half a minute"
FOLDER = "fp32_engines"
# Launches of all engines, by tier, at most: the comparison ends as soon as there are enough for an
# interval, and the intervals tell the fastest engine from all others.
LAUNCHES = {"brief": 1, "quick": 6, "standard": 10, "mlperf": 10}
KEY = ("cpu", "gpu", "cuda_graph", "threads", "batch_size")  # of a point in a record
COLUMNS = (
    "model", "device", *KEY, "backend", "ms", "over_fastest", "over_fastest_ci_low",
    "over_fastest_ci_high", "fastest", "tied", "n_launches", "n_rounds", "tier", "time_utc",
)  # fmt: skip

Medians = dict[str, list[list[float]]]  # milliseconds by engine, launch and round


def find(experiment: Experiment, batch_sizes: list[int], options: Options) -> dict[int, dict]:
    """Find the fastest FP32 engine for each of `batch_sizes`.

    Returns for each batch size `best_fp32` (name of the fastest engine), `fp32_ms` (milliseconds of
    each engine, means over launches) and `fp32_missing` (the engines for this device that were not
    compared, and why). Points that the study's record lacks for this processor are measured and
    added. A run of an FP32 script also measures those again that were timed more briefly than its
    `--timing`. A smoke run compares nothing and takes eager FP32. Raises `UserError` if the
    recorded engine cannot run here any more.
    """
    if options.smoke:
        return {
            size: {"best_fp32": "native", "fp32_ms": {}, "fp32_missing": {}} for size in batch_sizes
        }
    path = _path(experiment)
    longer = experiment.run.method == "fp32"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {size: point for size in batch_sizes if (point := _point(path, size, options))}
    wanted = [
        size
        for size in batch_sizes
        if size not in known or (longer and _is_briefer(known[size], options))
    ]
    if wanted:
        # Scripts that start at the same time wait: the first one measures for all.
        with FileLock(path.with_suffix(".lock")):
            missing = [size for size in wanted if not _is_enough(path, size, options, longer)]
            if missing:
                _remember(path, _compare(experiment, missing, options))
                rebuild(path.parent.parent)
        known = {size: _point(path, size, options) for size in batch_sizes}
    for point in known.values():
        _check(point, options)
    return {
        size: {
            "best_fp32": point["fastest"],
            "fp32_ms": {name: engine["ms"] for name, engine in point["engines"].items()},
            "fp32_missing": point["missing"],
        }
        for size, point in known.items()
    }


def _path(experiment: Experiment) -> Path:
    folder = experiment.options.results / experiment.data.study / FOLDER
    return folder / f"{experiment.run.model}_{experiment.options.device}.json"


def _key(size: int, options: Options) -> dict:
    """Return what identifies a point: the seed, the code and the day do not matter."""
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    values = environment.cpu()[0], gpu, options.cuda_graph, options.threads, size
    return dict(zip(KEY, values, strict=True))


def read(path: Path) -> dict:
    """Read a record; one that is missing or damaged has no points."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    valid = isinstance(content, dict) and isinstance(content.get("points"), list)
    return content if valid else {"points": []}


def _point(path: Path, size: int, options: Options) -> dict | None:
    key = _key(size, options)
    return next(
        (point for point in read(path)["points"] if {name: point[name] for name in KEY} == key),
        None,
    )


def _is_briefer(point: dict, options: Options) -> bool:
    return TIMING.index(point["tier"]) < TIMING.index(options.timing)


def _is_enough(path: Path, size: int, options: Options, longer: bool) -> bool:
    point = _point(path, size, options)
    return point is not None and not (longer and _is_briefer(point, options))


def _check(point: dict, options: Options) -> None:
    """Raise `UserError` if the fastest engine of `point` cannot run; say if versions differ."""
    name = point["fastest"]
    if reason := registry.problem(name, options.device):
        raise UserError(
            f"{name} is the fastest FP32 of this study, and cannot run here ({reason}). Install "
            "it, or give another --results for a new study."
        )
    ours = environment.versions()
    if changed := [
        package for package, version in point["versions"].items() if ours.get(package) != version
    ]:
        progress.say(
            f"timing: the fastest FP32, {name}, was found with other versions of "
            f"{', '.join(changed)}"
        )


def engines(options: Options) -> tuple[list[str], dict[str, str]]:
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


def _compare(experiment: Experiment, batch_sizes: list[int], options: Options) -> list[dict]:
    """Time all engines at each batch size; returns the points of the record."""
    names, missing = engines(options)
    progress.say(
        f"looking for the fastest FP32 with {options.threads} threads among {', '.join(names)}"
    )
    medians: dict[int, Medians] = {size: {name: [] for name in names} for size in batch_sizes}
    launches = LAUNCHES[options.timing]
    with progress.Bar("fastest FP32", launches * len(batch_sizes), "batch sizes") as bar:
        for launch in range(1, launches + 1):
            for size, rows in _launch(names, experiment, batch_sizes, options):
                for name, ms in zip(names, rows.T, strict=True):
                    medians[size][name].append(ms.round(4).tolist())
                bar.step(note=f"batch {size}")
            if launch >= stats.FEWEST_LAUNCHES and all(
                not describe(of_size)["tied"] for of_size in medians.values()
            ):
                break
    return [
        {
            **_key(size, options),
            **describe(medians[size]),
            "missing": missing,
            "tier": options.timing,
            "versions": environment.versions(),
            **environment.session(),
        }
        for size in batch_sizes
    ]


def _launch(names: list[str], experiment: Experiment, batch_sizes: list[int], options: Options):
    """Start all engines once; yields each batch size and milliseconds, (rounds, engines)."""
    how = options.device, options.threads, options.cuda_graph
    with contextlib.ExitStack() as stack:
        stack.enter_context(cores.reserved(options.threads))
        sides = [
            stack.enter_context(Worker(name, experiment.baseline.path, *how)) for name in names
        ]
        for size in sorted(batch_sizes):
            yield size, 1e3 * rounds.compare(sides, experiment.data.test, size)


def describe(medians: Medians) -> dict:
    """Compare engines from their milliseconds by launch and round.

    `fastest` has the lowest mean over launches. `tied` are the engines that cannot be told from it:
    the interval of the ratio within rounds contains 1, or there are too few launches for one.
    """
    by_launch = {
        name: [float(np.median(rounds)) for rounds in launches]
        for name, launches in medians.items()
    }
    sessions = [0] * len(next(iter(by_launch.values())))
    means = {name: stats.grouped_mean(ms, sessions) for name, ms in by_launch.items()}
    fastest, table, tied = min(means, key=means.get), {}, []
    for name, launches in medians.items():
        ratios = [
            float(np.median(np.array(ours) / np.array(best)))
            for ours, best in zip(launches, medians[fastest], strict=True)
        ]
        low, high = stats.interval(ratios, sessions)
        table[name] = {
            "ms": means[name],
            "over_fastest": stats.grouped_mean(ratios, sessions),
            "over_fastest_ci_low": low,
            "over_fastest_ci_high": high,
            "rounds_ms": launches,
        }
        if name != fastest and (low is None or low <= 1):
            tied.append(name)
    return {"fastest": fastest, "tied": tied, "engines": table}


def _remember(path: Path, points: list[dict]) -> None:
    """Add points to a record, in place of older ones with the same key."""
    keys = [tuple(point[name] for name in KEY) for point in points]
    kept = [
        point for point in read(path)["points"] if tuple(point[name] for name in KEY) not in keys
    ]
    content = {"points": sorted([*kept, *points], key=lambda point: str([point[n] for n in KEY]))}
    paths.write_text(path, json.dumps(content, indent=1) + "\n")


def rows(folder: Path) -> list[dict]:
    """Return the rows of fp32_engines.csv for the study in `folder`: one per engine and point."""
    listed = []
    for row in results.fp32_engines(folder):
        row["tied"] = row["backend"] in row["tied"]
        row["n_launches"] = len(row["rounds_ms"])
        row["n_rounds"] = sum(map(len, row["rounds_ms"]))
        listed.append({column: row[column] for column in COLUMNS})
    return listed


def rebuild(folder: Path) -> None:
    """Write fp32_engines.csv of the study in `folder`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows(folder):
        writer.writerow(
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in row.items()
            }
        )
    paths.write_text(folder / f"{FOLDER}.csv", text.getvalue())
