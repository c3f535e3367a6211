"""Results on disk: one JSON per run, which holds everything, and results.csv of all runs.

No torch. NumPy, scipy and filelock are imported by the functions that need them, so that
`reproduce.py --help` does not wait for them.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from utils import paths, progress
from utils.catalog import Run
from utils.cli import Options
from utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

FORMAT = 3
IMAGES = "test_images.json"
# The section of a run's JSON that each column of results.csv comes from. results/README.md explains
# the columns in this order.
SECTIONS = (
    ("run", ("study", "model", "method", "dtype", "backend", "device", "simulated", "seed")),
    ("data", ("negative_class", "positive_class")),
    ("timing", ("threads", "batch_size")),
    ("metrics", (
        "n_test", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "precision", "recall", "specificity", "f1",
        "balanced_accuracy", "roc_auc", "average_precision", "log_loss", "brier", "ece", "tn", "fp", "fn", "tp",
        "agreement_fp32", "logit_cosine", "sqnr_db", "kl_mean", "accuracy_difference", "accuracy_difference_ci_low",
        "accuracy_difference_ci_high", "gained", "lost", "flip_rate", "mcnemar_p", "mcnemar_p_holm", "margin", "verdict",
        "accuracy_reference", "sqnr_reference_db", "sqnr_vs_reference_db", "agreement_reference",
        "accuracy_fake_quant", "agreement_fake_quant",
    )),
    ("timing", (
        "latency_ms_p50", "latency_ms_mean", "latency_ms_std", "latency_ms_ci_low", "latency_ms_ci_high", "latency_ms_p90",
        "latency_ms_p95", "latency_ms_p99", "eager_fp32_ms", "best_fp32_ms", "single_stream_p90_ms", "multi_stream_p99_ms",
        "throughput_ips", "offline_ips",
        "speedup_vs_eager_fp32", "speedup_vs_eager_fp32_ci_low", "speedup_vs_eager_fp32_ci_high",
        "speedup_vs_best_fp32", "speedup_vs_best_fp32_ci_low", "speedup_vs_best_fp32_ci_high", "best_fp32",
        "n_timed", "n_launches", "n_rounds", "n_repeated", "contended", "load_s", "cold_start_s", "peak_memory_mb",
        "protocol", "tier",
    )),
    ("footprint", (
        "size_mb", "theoretical_mb", "activation_mb", "parameters", "macs", "weight_modules", "quantized_modules",
        "quantized_share", "quantized_macs_share",
    )),
    ("training", ("training_dtype",)),
    ("environment", ("native_fp16", "cpu", "isa", "torch", "git_commit", "git_dirty", "time_utc")),
    ("provenance", ("code_sha256", "data_sha256", "baseline_sha256", "artifact_sha256")),
)  # fmt: skip
COLUMNS = tuple(column for _, columns in SECTIONS for column in columns)
# Rows are sorted by these columns.
KEY = ("model", "method", "dtype", "backend", "device", "seed", "threads", "batch_size")


def run_id(run: dict) -> str:
    """Name of a run's files, for example `resnet18_ptq_int8_fbgemm_cpu_seed0`."""
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
    """Store a run, rebuild results.csv and return the JSON's path.

    An .npz beside the JSON holds `logits` float32 (n, 2) and `y` int64 (n,) of the test images in
    their fixed order, whose `names` (n) are kept once for the study. Scripts that run at once wait
    for each other. Raises `ValueError`, before anything is written, if a number is not finite.
    """
    import numpy as np
    from filelock import FileLock

    folder = results / record["run"]["study"]
    path = folder / "runs" / f"{run_id(record['run'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = as_json({"format": FORMAT, **record})  # first: if it fails, nothing is written
    with FileLock(folder / "results.lock"):
        with paths.atomic(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, logits=logits.astype(np.float32), y=y)
        paths.write_text(path, text)
        if names and test_images(folder) != list(names):
            paths.write_text(folder / IMAGES, json.dumps(list(names), indent=0) + "\n")
        rebuild(folder)
    return path


def test_images(folder: Path) -> list[str]:
    """Names of the test images of the study in `folder`, in the order of its answers; empty if they are not known."""
    try:
        names = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def as_json(record: dict) -> str:
    """A record as indented JSON, with each list of numbers on one line.

    Raises `ValueError` if a number is not finite.
    """
    text = json.dumps(record, indent=1, allow_nan=False)
    return (
        re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text) + "\n"
    )


def read(path: Path) -> dict:
    """Read a run's JSON.

    Raises `UserError` if it is damaged, of another version, breaks the schema, or is named after another run.
    """
    from utils import schema

    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run its script again."
        ) from None
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise UserError(
            f"{path} was written by another version of this code; move its study elsewhere, or delete it."
        )
    if why := schema.problem(record):
        raise UserError(f"{path} is no run ({why}); delete it and run its script again.")
    if path.stem != (name := run_id(record["run"])):
        raise UserError(f"{path} holds the run {name}; delete the copy, or give it its name.")
    return record


def _no_number(name: str):
    raise ValueError(f"{name} is no number")


def readable(path: Path) -> dict | None:
    """Read a run's JSON; says in a line why if it cannot be used, and returns None."""
    try:
        return read(path)
    except UserError as error:
        progress.say(f"results: left out: {error}")
        return None


def rebuild(folder: Path) -> Path:
    """Write results.csv of a study from its runs, and return its path.

    The same runs give the same bytes. Those that cannot be read are named and left out.
    """
    records = filter(None, map(readable, sorted((folder / "runs").glob("*.json"))))
    rows = adjusted([rows_of(record) for record in records])
    rows.sort(key=lambda row: tuple((row[column] is not None, row[column]) for column in KEY))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    path = folder / "results.csv"
    paths.write_text(path, text.getvalue())
    return path


def rows_of(record: dict) -> list[dict]:
    """The rows of a run, as {column: value}: one for each entry of its timing.

    That is one for each number of threads and batch size, or a single one if nothing was timed.
    """
    rows = []
    for timing in record["timing"]:
        parts = {**record, "timing": timing}
        rows.append(
            {name: parts[section].get(name) for section, names in SECTIONS for name in names}
        )
    return rows


def adjusted(runs: list[list[dict]]) -> list[dict]:
    """Join the rows of all runs of a study, with McNemar's p-values adjusted by Holm's method.

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
    """A value as text for results.csv.

    Floats have six significant digits (the JSON has all), None is empty, and spaces separate the
    items of a list.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe(run: Run, study: str, backend: str, options: Options) -> dict:
    """Say what was run: the section `run` of a record."""
    run = run.on(backend)
    names = {"study": study, "model": run.model, "method": run.method, "dtype": run.dtype}
    simulated = run.simulated_on(backend)
    return names | {
        "backend": backend,
        "device": options.device,
        "simulated": simulated,
        "seed": options.seed,
    }


def find(run: Run, study: str, backend: str, options: Options) -> dict | None:
    """The record of `run` on `backend`; None if it is missing, or cannot be used, which is said in a line."""
    path = (
        options.results / study / "runs" / f"{run_id(describe(run, study, backend, options))}.json"
    )
    return readable(path) if path.exists() else None
