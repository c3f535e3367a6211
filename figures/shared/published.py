"""The dissertation's figures, and the runs that they are compared with. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import pandas as pd

from utils import catalog, paths, stats

FIGURE = "published_vs_reproduced"  # name of the script that draws them, and of its picture
METHOD_OF_NAME = {method.label.lower(): name for name, method in catalog.METHODS.items()}
# The network of this run before conversion stands for the published "fake-quant".
FAKE_QUANT = ("qat", "int8", "fbgemm")
ELSE = "something else"  # the row names one thing and its figure measured another
KNOWN_BEFORE_CONVERSION = (
    "study", "model", "method", "dtype", "backend", "device", "simulated", "seed", "n_test", "cpu",
    "series", "accuracy_fake_quant",
)  # fmt: skip


def load() -> pd.DataFrame:
    """Read results/published.csv.

    `images` is the number of test images of an accuracy. `measured` is "as named", or ELSE if the
    script measured something other than the row names. `remark` says what is wrong with a figure.
    """
    return pd.read_csv(paths.RESULTS / "published.csv").fillna({"variant": ""})


def match(published_row: pd.Series, one: pd.DataFrame) -> pd.Series | None:
    """Find the run to compare a published row with, in a frame with one row per run.

    It is the run of the lowest seed, on the CPU if there is one; None if there is none. For
    "fake-quant" it is the network before conversion: its accuracy and interval, and no value that
    is only known after conversion.
    """
    fake = published_row["variant"] == "fake-quant"
    key = FAKE_QUANT
    if not fake:
        method = METHOD_OF_NAME[published_row["method"]]
        key = (method, published_row["dtype"], published_row["backend_here"])
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
    """Name a published row by its number format, its method and `more`, each word once."""
    method = METHOD_OF_NAME[row["method"]]
    name = "" if method == "fp32" else catalog.METHODS[method].label  # FP32 implies the baseline
    return " ".join(dict.fromkeys(filter(None, (catalog.FORMATS[row["dtype"]].label, name, *more))))


def before_conversion(row: pd.Series) -> pd.Series:
    """Turn the row of a QAT run into a row of its network before conversion."""
    accuracy, n = row["accuracy_fake_quant"], int(row["n_test"])
    low, high = stats.wilson(round(accuracy * n), n)
    dtype = catalog.FORMATS[row["dtype"]].label
    row = row.where(row.index.isin(KNOWN_BEFORE_CONVERSION))
    row["accuracy"], row["accuracy_ci_low"], row["accuracy_ci_high"] = accuracy, low, high
    row["simulated"], row["series"] = True, f"{dtype} QAT fake-quant (simulated)"
    return row
