"""Results on disk: one JSON a run, which holds everything, and results.csv, which is rebuilt from them. No torch.

NumPy, scipy and filelock are imported by what needs them: `reproduce.py --help` does not wait for them.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from utils import cli, paths
from utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 2
# Where each column of results.csv comes from in a run's JSON; results/README.md explains them in this order.
SECTIONS = (
    ("run", ("study", "model", "method", "dtype", "backend", "device", "simulated", "seed")),
    ("timing", ("threads", "batch_size")),
    ("metrics", (
        "n_test", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "precision", "recall", "specificity", "f1",
        "balanced_accuracy", "roc_auc", "average_precision", "log_loss", "brier", "ece", "tn", "fp", "fn", "tp",
        "agreement_fp32", "logit_cosine", "sqnr_db", "kl_mean", "accuracy_difference", "accuracy_difference_ci_low",
        "accuracy_difference_ci_high", "gained", "lost", "flip_rate", "mcnemar_p", "mcnemar_p_holm", "margin", "verdict",
        "accuracy_fake_quant", "agreement_fake_quant",
    )),
    ("timing", (
        "latency_ms_p50", "latency_ms_mean", "latency_ms_std", "latency_ms_ci_low", "latency_ms_ci_high", "latency_ms_p90",
        "latency_ms_p95", "latency_ms_p99", "single_stream_p90_ms", "multi_stream_p99_ms", "throughput_ips", "offline_ips",
        "speedup_vs_eager_fp32", "speedup_vs_eager_fp32_ci_low", "speedup_vs_eager_fp32_ci_high",
        "speedup_vs_best_fp32", "speedup_vs_best_fp32_ci_low", "speedup_vs_best_fp32_ci_high", "best_fp32",
        "n_timed", "n_launches", "n_rounds", "n_repeated", "contended", "load_s", "cold_start_s", "peak_memory_mb",
        "protocol", "tier",
    )),
    ("footprint", (
        "size_mb", "theoretical_mb", "activation_mb", "parameters", "macs", "weight_modules", "quantized_modules",
        "quantized_share",
    )),
    ("training", ("training_dtype",)),
    ("environment", ("native_fp16", "cpu", "isa", "torch", "git_commit", "git_dirty", "time_utc")),
    ("provenance", ("code_sha256", "data_sha256", "baseline_sha256", "artifact_sha256")),
)  # fmt: skip
COLUMNS = tuple(column for _, columns in SECTIONS for column in columns)
KEY = ("model", "method", "dtype", "backend", "device", "seed", "threads", "batch_size")  # rows are sorted by these


def run_id(run: dict) -> str:
    """Name of a run's files: `resnet18_ptq_int8_fbgemm_cpu_seed0`."""
    method = "fp32" if run["method"] == "fp32" else f"{run['method']}_{run['dtype']}"
    return f"{run['model']}_{method}_{run['backend']}_{run['device']}_seed{run['seed']}"


def check(study: str, digest: str, args) -> None:
    """Raise `UserError` when this study's results are about other images: rows of one table must be comparable."""
    for path in sorted((args.results / study / "runs").glob("*.json")):
        if read(path)["provenance"]["data_sha256"] != digest:
            raise UserError(
                f"{path.parent} holds runs on other images than these. Give another folder with --results, or move it away."
            )
        return


def write(record: dict, logits: "np.ndarray", y: "np.ndarray", results: Path) -> Path:
    """Store a run and rebuild results.csv; returns the JSON's path. Scripts running at once wait for each other.

    Beside the JSON goes an .npz with `logits` float32 (n, 2) and `y` int64 (n,) of the test images in their fixed order.
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
        rebuild(folder)
    return path


def as_json(record: dict) -> str:
    """A record as indented JSON, lists of numbers on one line; raises `ValueError` for what is not finite."""
    text = json.dumps(record, indent=1, allow_nan=False)
    return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def read(path: Path) -> dict:
    """A run's JSON; raises `UserError` when it is damaged, or of a version that this code does not write."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); delete it and run its script again.") from None
    if record.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of this code; move its study away, or delete it.")
    return record


def rebuild(folder: Path) -> Path:
    """Write results.csv of a study from its runs; the same runs give the same bytes."""
    rows = adjusted([rows_of(read(path)) for path in sorted((folder / "runs").glob("*.json"))])
    rows.sort(key=lambda row: tuple((row[column] is not None, row[column]) for column in KEY))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    path = folder / "results.csv"
    paths.write_text(path, text.getvalue())
    return path


def rows_of(record: dict) -> list[dict]:
    """The rows of a run: one for each batch size that was timed, or one without where none was."""
    rows = []
    for timing in record["timing"]:
        parts = {**record, "timing": timing}
        rows.append({name: parts[section].get(name) for section, names in SECTIONS for name in names})
    return rows


def adjusted(runs: list[list[dict]]) -> list[dict]:
    """All rows of a study from those of each run, McNemar's p-values adjusted for as many tests as there are variants (Holm)."""
    import numpy as np

    from utils import stats

    tested = [rows for rows in runs if rows[0]["mcnemar_p"] is not None]
    p_values = stats.holm(np.array([rows[0]["mcnemar_p"] for rows in tested]))
    for rows, p_value in zip(tested, p_values, strict=True):
        for row in rows:
            row["mcnemar_p_holm"] = float(p_value)
    return [row for rows in runs for row in rows]


def _cell(value) -> str:
    """A value as text: floats with six significant digits (the JSON has all), nothing for None, lists by spaces."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe(run: cli.Run, study: str, backend: str, simulated: bool, args) -> dict:
    """The part of a record that says what was run."""
    run = run.on(backend)
    names = {"study": study, "model": run.model, "method": run.method, "dtype": run.dtype}
    return names | {"backend": backend, "device": args.device, "simulated": simulated, "seed": args.seed}
