"""Runs that differ in nothing but the seed of training, judged together. No torch."""

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
    """Return a row for each model and variant that was trained with several seeds.

    `one` has a row for each run, whose answers are in `folder`. Of a variant this gives `seeds` (their
    number), the mean `accuracy`, its `std` over seeds, and for what quantizes the mean
    `accuracy_difference` to the FP32 network of the same seed, with its `verdict`. Intervals (`_ci_low`
    and `_ci_high`) are for other seeds and other images.
    """
    one = one.assign(run=[results.run_id(row) for row in one.to_dict("records")])
    baselines = one[one["method"] == "fp32"].set_index(["model", "device", "seed"])["run"].to_dict()
    rows = []
    for (model, _), same in one.groupby(["model", "series"], sort=False, observed=True):
        if len(same) < 2:
            continue
        right = decided(folder, same["run"])
        kind = {name: same[name].iloc[0] for name in KIND}
        row = (
            kind
            | {"seeds": len(same), "std": right.mean(1).std(ddof=1)}
            | mean("accuracy", right, 0)
        )
        bases = [
            baselines.get((model, device, seed))
            for device, seed in zip(same["device"], same["seed"], strict=True)
        ]
        if kind["method"] != "fp32" and all(bases):
            row |= mean("accuracy_difference", right - decided(folder, bases), -1)
            row["verdict"] = stats.verdict(
                row["accuracy_difference_ci_low"], row["accuracy_difference_ci_high"]
            )
        rows.append(row)
    means = pd.DataFrame(rows, columns=[*KIND, "seeds", "std", *INTERVALS, "verdict"])
    return means.astype(
        {name: one[name].dtype for name in KIND}
    )  # models and methods in the catalog's order


def decided(folder: Path, names: list[str]) -> np.ndarray:
    """Return which test images the runs `names` decide rightly: 1.0 or 0.0, (runs, images)."""
    answers = [runs.answers(folder / f"{name}.npz") for name in names]
    if any(not np.array_equal(y, answers[0][1]) for _, y in answers):
        raise UserError(
            f"the runs {', '.join(names)} are about different test images; run the scripts of the older ones again."
        )
    return np.array([logits.argmax(1) == y for logits, y in answers], float)


def mean(name: str, values: np.ndarray, least: float) -> dict[str, float]:
    """Return the mean of `values` (seeds, images) with its interval, as columns called after `name`.

    The interval ends where no mean can be: at `least`, and at 1.
    """
    low, high = np.clip(stats.crossed_interval(values), least, 1)
    return {name: values.mean(), f"{name}_ci_low": low, f"{name}_ci_high": high}
