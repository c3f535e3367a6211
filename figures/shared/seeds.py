"""Runs that differ only in the training seed, judged together. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

from pathlib import Path

import numpy as np
import pandas as pd

from figures.shared import runs
from utils import results, stats
from utils.errors import UserError

KIND = ("model", "series", "method", "dtype", "backend")
INTERVALS = [
    name + end
    for name in ("accuracy", "accuracy_difference")
    for end in ("", "_ci_low", "_ci_high")
]


def together(one: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return one row per model and variant that was trained with several seeds.

    `one` has one row per run; the runs' answers are in `folder`. A row of the result has `seeds`
    (their number), the mean `accuracy` and its `std` over seeds. Quantized variants also have the
    mean `accuracy_difference` to the FP32 network of the same seed, and a `verdict`. Intervals
    (`_ci_low` and `_ci_high`) are for other seeds and other images.
    """
    one = one.assign(run=[results.run_id(row) for row in one.to_dict("records")])
    baselines = one[one["method"] == "fp32"].set_index(["model", "device", "seed"])["run"].to_dict()
    rows = []
    for _, same in one.groupby(["model", "series"], sort=False, observed=True):
        if len(same) > 1:
            rows.append(_row(same, baselines, folder))
    means = pd.DataFrame(rows, columns=[*KIND, "seeds", "std", *INTERVALS, "verdict"])
    # Models and methods stay in the catalog's order.
    return means.astype({name: one[name].dtype for name in KIND})


def _row(same: pd.DataFrame, baselines: dict[tuple, str], folder: Path) -> dict:
    """Judge one variant from its runs; `baselines` has FP32 runs by model, device and seed."""
    right = decided(folder, same["run"])
    row = {name: same[name].iloc[0] for name in KIND}
    row |= {"seeds": len(same), "std": right.mean(1).std(ddof=1)}
    row |= mean("accuracy", right, 0)
    keys = zip(same["model"], same["device"], same["seed"], strict=True)
    bases = [baselines.get(key) for key in keys]
    if row["method"] != "fp32" and all(bases):
        row |= mean("accuracy_difference", right - decided(folder, bases), -1)
        low, high = row["accuracy_difference_ci_low"], row["accuracy_difference_ci_high"]
        row["verdict"] = stats.verdict(low, high)
    return row


def decided(folder: Path, names: list[str]) -> np.ndarray:
    """Return 1.0 where a run in `names` classifies a test image correctly, (runs, images)."""
    answers = [runs.answers(folder / f"{name}.npz") for name in names]
    if any(not np.array_equal(y, answers[0][1]) for _, y in answers):
        raise UserError(
            f"the runs {', '.join(names)} are about different test images; run the scripts of the "
            "older ones again."
        )
    return np.array([logits.argmax(1) == y for logits, y in answers], float)


def mean(name: str, values: np.ndarray, least: float) -> dict[str, float]:
    """Return the mean of `values` (seeds, images) and its interval as columns `name`.

    The interval ends where a mean cannot be: at `least` and at 1.
    """
    low, high = np.clip(stats.crossed_interval(values), least, 1)
    return {name: values.mean(), f"{name}_ci_low": low, f"{name}_ci_high": high}
