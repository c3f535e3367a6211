"""What makes rows of a study comparable: one undisturbed FP32 reference. No torch.

A speed-up is a ratio to the fastest FP32. If two rows name different engines, their speed-ups
differ even where they are equally fast. So every model, processor, number of threads and batch size
of a study has one reference, and rows that were timed against another engine are converted by the
measured ratio of the two.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

# Above this ratio of eager FP32's time to its quietest known time, something else was running for
# all of a measurement, which its rounds cannot show. In the two studies without neighbours, 1 of
# 135 rows is above it; in the study on a shared host, 43 of 294.
SLOWED = 1.3
SPEEDUP = "speedup_vs_best_fp32"
MULTIPLES = (SPEEDUP, f"{SPEEDUP}_ci_low", f"{SPEEDUP}_ci_high", "best_fp32_ms")

Point = tuple  # what identifies the comparisons that share a reference


def point(record: dict, row: dict) -> Point:
    """Return what identifies the circumstances of a row of a record's timing."""
    graph = str(row["protocol"]).endswith("+cuda-graph")
    gpu = record["environment"].get("gpu")
    return (
        row["model"], row["device"], row["cpu"], gpu, graph, row["threads"], row["batch_size"],
    )  # fmt: skip


def unify(records: list[dict], runs: list[list[dict]], measured: Iterable[dict]) -> None:
    """Give all rows at a point one reference, and mark the rows that something slowed down.

    `runs` has the rows of each of `records`, which are changed in place. `measured` are the rows of
    fp32_engines.csv. Where it has no winner, the reference is the engine with the least time
    relative to eager FP32 over all searches that the records hold.
    """
    tables, winners = _tables(records, runs, measured)
    quietest = _quietest(records, runs)
    for record, rows in zip(records, runs, strict=True):
        for row in rows:
            if row["batch_size"] is None or row["best_fp32"] is None:
                continue
            where = point(record, row)
            reference = winners.get(where) or _fastest(tables[where]) or row["best_fp32"]
            _convert(row, reference, tables[where])
            if row["eager_fp32_ms"] is not None:
                slow = row["eager_fp32_ms"] > SLOWED * quietest[where, row["torch"]]
                row["contended"] = bool(row["contended"]) or slow


def _tables(
    records: list[dict], runs: list[list[dict]], measured: Iterable[dict]
) -> tuple[dict[Point, list[dict]], dict[Point, str]]:
    """Return the comparisons of FP32 engines at each point, and the recorded winners.

    A comparison is {engine: milliseconds}. If the study's record has a point, it alone counts.
    """
    recorded, winners, searched = defaultdict(dict), {}, defaultdict(list)
    for entry in measured:
        where = (
            entry["model"], entry["device"], entry["cpu"], entry["gpu"], entry["cuda_graph"],
            entry["threads"], entry["batch_size"],
        )  # fmt: skip
        recorded[where][entry["backend"]] = entry["ms"]
        if entry["fastest"]:
            winners[where] = entry["backend"]
    for record, rows in zip(records, runs, strict=True):
        for timing, row in zip(record["timing"], rows, strict=True):
            table = timing.get("fp32_ms")
            if table and table not in searched[point(record, row)]:
                searched[point(record, row)].append(table)
    points = {*recorded, *searched}
    tables = {
        where: [recorded[where]] if where in recorded else searched[where] for where in points
    }
    return defaultdict(list, tables), winners


def _fastest(tables: list[dict]) -> str | None:
    """Return the engine with the least time relative to eager FP32; None without comparisons."""
    names = sorted({name for table in tables for name in table})
    times = {name: ratio(name, "native", tables) for name in names}
    times = {name: time for name, time in times.items() if time is not None}
    return min(times, key=times.get) if times else None


def ratio(name: str, other: str, tables: list[dict]) -> float | None:
    """Return the time of one engine over another's: the geometric mean over the comparisons.

    None if no comparison has both.
    """
    if name == other:
        return 1.0
    logs = [math.log(table[name] / table[other]) for table in tables if {name, other} <= {*table}]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _convert(row: dict, reference: str, tables: list[dict]) -> None:
    """Make `reference` the reference of a row.

    Its speed-up becomes None if the two engines were never compared.
    """
    row["best_fp32_converted"] = row["best_fp32"] != reference
    if not row["best_fp32_converted"]:
        return
    factor = ratio(reference, row["best_fp32"], tables)
    for name in MULTIPLES:
        known = factor is not None and row[name] is not None
        row[name] = row[name] * factor if known else None
    row["best_fp32"] = reference


def _quietest(records: list[dict], runs: list[list[dict]]) -> dict[tuple, float]:
    """Return the least time of eager FP32 at each point, by version of torch."""
    least: dict[tuple, float] = defaultdict(lambda: math.inf)
    for record, rows in zip(records, runs, strict=True):
        for row in rows:
            if row["batch_size"] is not None and row["eager_fp32_ms"] is not None:
                key = point(record, row), row["torch"]
                least[key] = min(least[key], row["eager_fp32_ms"])
    return least
