"""The dissertation's figures, and the runs that they are compared with. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import pandas as pd

from utils import catalog, paths, stats

FIGURE = "published_vs_reproduced"  # name of the script that draws them, and of its picture
METHODS = {
    method.label.lower(): name for name, method in catalog.METHODS.items()
}  # as the dissertation names them
FAKE_QUANT = (
    "qat",
    "int8",
    "fbgemm",
)  # the run whose network before conversion stands for the published "fake-quant"
ELSE = "something else"  # that is not of what the row names
KNOWN = (
    "study",
    "model",
    "method",
    "dtype",
    "backend",
    "device",
    "simulated",
    "seed",
    "n_test",
    "cpu",
    "series",
)


def load() -> pd.DataFrame:
    """Read results/published.csv.

    `images`: how many test images an accuracy is of; `measured`: "as named", or ELSE if the script
    measured something else than the row names; `remark`: what is wrong with a figure.
    """
    return pd.read_csv(paths.RESULTS / "published.csv").fillna({"variant": ""})


def match(published_row: pd.Series, one: pd.DataFrame) -> pd.Series | None:
    """Find the run that a published row is compared with, in a frame with one row for each run.

    It is that of the lowest seed, on the CPU if it ran there, and None where none did. For
    "fake-quant" it is the network before conversion: its accuracy and interval, and nothing that
    holds only afterwards.
    """
    fake = published_row["variant"] == "fake-quant"
    key = (
        FAKE_QUANT
        if fake
        else (
            METHODS[published_row["method"]],
            published_row["dtype"],
            published_row["backend_here"],
        )
    )
    runs = one[one["model"] == published_row["model"]]
    for column, value in zip(("method", "dtype", "backend"), key, strict=True):
        runs = runs[runs[column] == value]
    if fake:
        runs = runs.dropna(subset="accuracy_fake_quant")
    if runs.empty:
        return None
    row = runs.sort_values(["seed", "device"], kind="stable").iloc[0]
    return before_conversion(row) if fake else row


def label(row: pd.Series, *more: str) -> str:
    """Name a published row by its number format and method, and what else is given, each once."""
    method = METHODS[row["method"]]
    name = (
        "" if method == "fp32" else catalog.METHODS[method].label
    )  # FP32 says that it is the baseline
    return " ".join(dict.fromkeys(filter(None, (catalog.FORMATS[row["dtype"]].label, name, *more))))


def before_conversion(row: pd.Series) -> pd.Series:
    """Turn a QAT run's row into one of the network before conversion, which rounds in FP32."""
    accuracy, n = row["accuracy_fake_quant"], int(row["n_test"])
    low, high = stats.wilson(round(accuracy * n), n)
    dtype = catalog.FORMATS[row["dtype"]].label
    row = row.where(row.index.isin((*KNOWN, "accuracy_fake_quant")))
    row["accuracy"], row["accuracy_ci_low"], row["accuracy_ci_high"] = accuracy, low, high
    row["simulated"], row["series"] = True, f"{dtype} QAT fake-quant (simulated)"
    return row
