"""results.csv, rebuilt after every run: its time for each run must not grow with their number."""

from collections.abc import Iterator
from pathlib import Path

import paired

from tests.records import record
from utils import results

FEW, MANY = 100, {1_000: 5, 10_000: 2}  # runs, and for many the rounds that take a minute or two
BATCHES = (1, 8, 16, 32, 64)
ROUNDS, RUNS = 56, 10  # of each batch size and side: about 50 KB of JSON a run, 10,000 of which fit on a disk


def results_csv(settings: paired.Settings) -> Iterator[paired.Row]:
    """Seconds a run of `rebuild`, of many runs over few, with files of the same length."""
    few, many = (2, {4: 1, 8: 1}) if settings.smoke else (FEW, MANY)
    small = study(settings.folder / "few", few)
    for count, rounds in many.items():
        large = study(settings.folder / str(count), count)
        what = f"results.csv of {count} runs, time of each over that of {few}"
        yield paired.cost(what, rebuilds(large, count, 1), rebuilds(small, few, 3), 1.3, rounds)


def study(folder: Path, count: int) -> Path:
    """A study of `count` runs that differ in their seed."""
    given = record(batches=BATCHES)
    samples = [[round(1 + number / 7, 4) for number in range(RUNS)]] * ROUNDS
    given["timing"] = [entry | {"samples_ms": samples, "eager_samples_ms": samples} for entry in given["timing"]]
    text = results.as_json({"format": results.FORMAT, **given})
    before, after = text.split('"seed": 0')
    (folder / "runs").mkdir(parents=True)
    for seed in range(count):
        name = results.run_id(given["run"] | {"seed": seed})
        (folder / "runs" / f"{name}.json").write_text(f'{before}"seed": {seed}{after}', encoding="utf-8")
    return folder


def rebuilds(folder: Path, count: int, times: int) -> paired.Turn:
    """A turn of so many `times`; seconds a run."""
    turn = paired.turn(lambda: results.rebuild(folder), times)
    return lambda: [seconds / count for seconds in turn()]
