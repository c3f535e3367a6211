"""Results on disk: one JSON per run with everything in it, and results.csv with all runs.

No torch. The functions that need NumPy, scipy and filelock import them, so `reproduce.py --help`
does not wait for them.
"""

import csv
import io
import json
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from utils import columns, layer_counts, paths, progress, references
from utils.catalog import Run
from utils.cli import Options
from utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

FORMAT = 3
TIMED = ("latency_ms", "speedup_vs")  # beginnings of the columns of timing with intervals
IMAGES = "test_images.json"
# Runs of neighbouring columns of one section of a run's JSON, as (section, names).
SECTIONS = tuple(
    (section, tuple(column.name for column in same))
    for section, same in groupby(columns.COLUMNS, lambda column: column.section)
)
COLUMNS = tuple(column.name for column in columns.COLUMNS)
# Rows are sorted by these columns.
KEY = ("model", "method", "dtype", "backend", "device", "seed", "threads", "batch_size")


def run_id(run: dict) -> str:
    """Name of a run's files, such as `resnet18_ptq_int8_fbgemm_cpu_seed0`."""
    method = "fp32" if run["method"] == "fp32" else f"{run['method']}_{run['dtype']}"
    return f"{run['model']}_{method}_{run['backend']}_{run['device']}_seed{run['seed']}"


def images_digest(folder: Path) -> str | None:
    """Hash of the images of the runs in a study's `folder`; None if it has no readable run."""
    records = map(readable, sorted((folder / "runs").glob("*.json")))
    record = next(filter(None, records), None)
    return None if record is None else record["provenance"]["data_sha256"]


def write(
    record: dict, logits: "np.ndarray", y: "np.ndarray", results: Path, names: "Sequence[str]" = ()
) -> Path:
    """Store a run, rebuild results.csv and return the path of the run's JSON.

    An .npz next to the JSON holds `logits` float32 (n, 2) and `y` int64 (n,) of the test images in
    their fixed order. The study keeps their `names` (n) once. Scripts that run at the same time
    wait for each other. Raises `ValueError` if a number is not finite, before writing anything.
    """
    import numpy as np
    from filelock import FileLock

    folder = results / record["run"]["study"]
    path = folder / "runs" / f"{run_id(record['run'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = as_json({"format": FORMAT, **record})  # before any write, because this may fail
    with FileLock(folder / "results.lock"):
        with paths.atomic(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, logits=logits.astype(np.float32), y=y)
        paths.write_text(path, text)
        if names and test_images(folder) != list(names):
            paths.write_text(folder / IMAGES, json.dumps(list(names), indent=0) + "\n")
        rebuild(folder)
    return path


def test_images(folder: Path) -> list[str]:
    """Names of a study's test images in the order of its answers; empty if unknown."""
    try:
        names = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if valid else []


def as_json(record: dict) -> str:
    """Format a record as indented JSON, with each list of numbers on one line.

    Raises `ValueError` if a number is not finite.
    """
    text = json.dumps(record, indent=1, allow_nan=False)
    text = re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
    return f"{text}\n"


def read(path: Path) -> dict:
    """Read a run's JSON.

    Raises `UserError` if it is damaged, comes from another version of this code, breaks the schema
    or has the name of another run.
    """
    from utils import schema

    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run its script again."
        ) from None
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise UserError(
            f"{path} was written by another version of this code; move its study elsewhere, or "
            "delete it."
        )
    if why := schema.problem(record):
        raise UserError(f"{path} is not a run ({why}); delete it and run its script again.")
    if path.stem != (name := run_id(record["run"])):
        raise UserError(f"{path} holds the run {name}; delete the file, or rename it.")
    return record


def _not_a_number(name: str):
    raise ValueError(f"{name} is not a number")


def readable(path: Path) -> dict | None:
    """Read a run's JSON; print the reason and return None if it cannot be used."""
    try:
        return read(path)
    except UserError as error:
        progress.say(f"results: left out: {error}")
        return None


def rebuild(folder: Path) -> Path:
    """Write a study's results.csv from its runs and return the path.

    The same runs give the same bytes. Runs that cannot be read are named and left out.
    """
    records = list(filter(None, map(readable, sorted((folder / "runs").glob("*.json")))))
    runs = [rows_of(record) for record in records]
    references.unify(records, runs, fp32_engines(folder))
    rows = adjusted(runs)
    rows.sort(key=lambda row: tuple((row[column] is not None, row[column]) for column in KEY))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    path = folder / "results.csv"
    paths.write_text(path, text.getvalue())
    return path


def rows_of(record: dict) -> list[dict]:
    """Rows of a run, as {column: value}: one per entry of its timing.

    There is one entry per number of threads and batch size, or a single one if nothing was timed.
    """
    rows = []
    # Records made before the column existed have the engine's counts.
    layers = {"integer_layers": layer_counts.integer_layers(record)}
    footprint = layers | record["footprint"]
    for timing in record["timing"]:
        parts = {**record, "timing": timing, "footprint": footprint}
        row = {column.name: parts[column.section].get(column.name) for column in columns.COLUMNS}
        rows.append(_of_older_code(row))
    return rows


def _of_older_code(row: dict) -> dict:
    """Fill in what a record of older code does not say, and leave out what it should not have."""
    from utils.stats import FEWEST_LAUNCHES

    if row["n_launches"] is not None:
        row["n_sessions"] = row["n_sessions"] or 1
        if row["n_sessions"] == 1 and row["n_launches"] < FEWEST_LAUNCHES:
            row |= {name: None for name in row if name.startswith(TIMED) and "_ci_" in name}
    return row


def fp32_engines(folder: Path) -> list[dict]:
    """Read the comparisons of FP32 engines in a study's `folder`, one dict per engine and point.

    Their files are fp32_engines/MODEL_DEVICE.json; damaged ones are left out.
    """
    rows = []
    for path in sorted((folder / "fp32_engines").glob("*.json")):
        model, _, device = path.stem.rpartition("_")
        try:
            points = json.loads(path.read_text(encoding="utf-8"))["points"]
            for point in points:
                for name, engine in point["engines"].items():
                    of_engine = {"backend": name, "fastest": name == point["fastest"]}
                    rows.append({**point, **engine, "model": model, "device": device, **of_engine})
        except (OSError, ValueError, KeyError, TypeError):
            progress.say(f"results: left out: {path} is damaged; delete it.")
    return rows


def adjusted(runs: list[list[dict]]) -> list[dict]:
    """Join the rows of a study's runs and adjust McNemar's p-values by Holm's method.

    `runs` has the rows of each run. Each run with a p-value counts as one test.
    """
    import numpy as np

    from utils import stats

    tested = [rows for rows in runs if rows[0]["mcnemar_p"] is not None]
    p_values = stats.holm(np.array([rows[0]["mcnemar_p"] for rows in tested]))
    for rows, p_value in zip(tested, p_values, strict=True):
        for row in rows:
            row["mcnemar_p_holm"] = float(p_value)
    return [row for rows in runs for row in rows]


def _cell(value) -> str:
    """Format a value for results.csv.

    Floats have six significant digits (the JSON has all of them). None is empty. Spaces separate
    the items of a list.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe(run: Run, study: str, backend: str, options: Options) -> dict:
    """Section `run` of a record: what was run."""
    run = run.on(backend)
    return {
        "study": study,
        "model": run.model,
        "method": run.method,
        "dtype": run.dtype,
        "backend": backend,
        "device": options.device,
        "simulated": run.simulated_on(backend),
        "seed": options.seed,
    }


def find(run: Run, study: str, backend: str, options: Options) -> dict | None:
    """Read the record of `run` on `backend`; None if there is none or it cannot be used."""
    name = run_id(describe(run, study, backend, options))
    path = options.results / study / "runs" / f"{name}.json"
    return readable(path) if path.exists() else None
