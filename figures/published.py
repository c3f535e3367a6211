"""The dissertation's figures, and which run of a study each of them is to be compared with. No torch."""

import pandas as pd
import style

from utils import paths, stats

METHODS = {"baseline": "fp32"}  # named otherwise there
FAKE_QUANT = ("qat", "int8", "fbgemm")  # the run whose network before conversion stands for the published "fake-quant"
KNOWN = ("study", "model", "method", "dtype", "backend", "device", "simulated", "seed", "n_test", "cpu", "series")


def load() -> pd.DataFrame:
    """results/published.csv, one row a published figure; `remark` says what is wrong with it."""
    return pd.read_csv(paths.RESULTS / "published.csv").fillna({"variant": ""})


def match(published_row: pd.Series, frame_one_row_per_run: pd.DataFrame) -> pd.Series | None:
    """The run that corresponds to a published row, of the lowest seed and on the CPU if it ran there; None where none did.

    For "fake-quant" it is the network before conversion: its accuracy and interval, and nothing that holds only afterwards.
    """
    fake = published_row["variant"] == "fake-quant"
    method = METHODS.get(published_row["method"], published_row["method"])
    key = FAKE_QUANT if fake else (method, published_row["dtype"], published_row["backend_here"])
    frame = frame_one_row_per_run
    found = frame[frame["model"] == published_row["model"]]
    for column, value in zip(("method", "dtype", "backend"), key, strict=True):
        found = found[found[column] == value]
    if fake:
        found = found.dropna(subset="accuracy_fake_quant")
    if found.empty:
        return None
    row = found.sort_values(["seed", "device"], kind="stable").iloc[0]
    return before_conversion(row) if fake else row


def label(row: pd.Series, *more: str) -> str:
    """A published row's dtype and method, and what else is given, each once."""
    method = style.METHODS.get(row["method"], "")  # "baseline" need not be said
    return " ".join(dict.fromkeys(filter(None, (style.DTYPES[row["dtype"]], method, *more))))


def before_conversion(row: pd.Series) -> pd.Series:
    """A QAT run's row with the accuracy of the network that rounds in FP32; all else that was measured left empty."""
    accuracy, n = row["accuracy_fake_quant"], int(row["n_test"])
    low, high = stats.wilson(round(accuracy * n), n)
    row = row.where(row.index.isin((*KNOWN, "accuracy_fake_quant")))
    row["accuracy"], row["accuracy_ci_low"], row["accuracy_ci_high"] = accuracy, low, high
    row["simulated"], row["series"] = True, f"{style.DTYPES[row['dtype']]} QAT fake-quant (simulated)"
    return row
