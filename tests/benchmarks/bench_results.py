"""Benchmark of results.csv: rebuilding must not take longer per run as runs accumulate."""

from collections.abc import Iterator
from pathlib import Path

import paired

from tests.records import record
from utils import results

FEW = 100  # runs
MANY = {1_000: 5, 10_000: 2}  # numbers of runs, and rounds for each, which take a minute or two
BATCHES = (1, 8, 16, 32, 64)
# Samples per batch size and side. They make 50 KB of JSON per run; 10,000 runs fit on a disk.
ROUNDS, RUNS = 56, 10


def results_csv(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time `rebuild` per run, for many runs against few, with JSON files of the same length."""
    few, many = (2, {4: 1, 8: 1}) if settings.smoke else (FEW, MANY)
    small = study(settings.folder / "few", few)
    for count, rounds in many.items():
        large = study(settings.folder / str(count), count)
        what = f"results.csv of {count} runs, time per run relative to {few} runs"
        yield paired.cost(what, rebuilds(large, count, 1), rebuilds(small, few, 3), 1.3, rounds)


def study(folder: Path, count: int) -> Path:
    """Write a study of `count` runs that differ only in their seed."""
    given = record(batches=BATCHES)
    samples = [[round(1 + number / 7, 4) for number in range(RUNS)]] * ROUNDS
    given["timing"] = [
        entry | {"samples_ms": samples, "eager_samples_ms": samples} for entry in given["timing"]
    ]
    text = results.as_json({"format": results.FORMAT, **given})
    before, after = text.split('"seed": 0')
    (folder / "runs").mkdir(parents=True)
    for seed in range(count):
        name = results.run_id(given["run"] | {"seed": seed})
        (folder / "runs" / f"{name}.json").write_text(
            f'{before}"seed": {seed}{after}', encoding="utf-8"
        )
    return folder


def rebuilds(folder: Path, count: int, times: int) -> paired.Turn:
    """Make a turn of `times` rebuilds, which returns seconds per run."""
    turn = paired.turn(lambda: results.rebuild(folder), times)
    return lambda: [seconds / count for seconds in turn()]
