"""results.csv as a data frame, and selections from it. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

from pathlib import Path

import numpy as np
import pandas as pd

from utils import catalog, results, studies
from utils.columns import COLUMNS
from utils.errors import UserError

RUN = ["model", "method", "dtype", "backend", "device", "seed"]  # columns that identify a run
ORDER = ["model", "method", "dtype", "backend"]
DEPLOYED = ["method", "dtype", "backend"]  # columns that models have in common
TIMING = [
    column.name for column in COLUMNS if column.section == "timing" and column.name != "threads"
]
# Columns that are read literally, because a class may be called "NA" or "1".
TEXTS = ("study", "negative_class", "positive_class")
# An empty batch size means that nothing was timed.
TYPES = dict.fromkeys(TEXTS, str) | {"batch_size": "Int64"}
NAMES = {
    "model": catalog.MODELS,
    "method": catalog.METHODS,
    "dtype": catalog.FORMATS,
    "backend": catalog.BACKENDS,
}


def read(path: Path) -> pd.DataFrame:
    """Read results.csv in the catalog's order and add columns.

    `series` is a label, such as "INT8 PTQ fbgemm", and `deployment` is the same without the method.
    `processor` is `cpu`, followed by the instruction sets if several processors share one name;
    `fp32_processor` is the processor of the FP32 run that a row is compared with.
    """
    frame = _table(path)
    for column in ("model", "method"):
        frame[column] = pd.Categorical(frame[column], list(NAMES[column]), ordered=True)
    dtype = frame["dtype"].map(_labels(catalog.FORMATS))
    method = frame["method"].astype(str).map(_labels(catalog.METHODS) | {"fp32": ""})
    suffix = _suffix(frame)
    words = dtype + " " + method + " " + frame["backend"]
    frame["series"] = words.str.split().str.join(" ") + suffix
    frame["deployment"] = dtype + " " + frame["backend"] + suffix
    frame["processor"] = processor_of_each(frame)
    columns = ["model", "device", "seed"]
    baselines = frame[frame["method"] == "fp32"].drop_duplicates(columns)
    processor = baselines.set_index(columns)["processor"].to_dict()
    keys = zip(frame["model"], frame["device"], frame["seed"], strict=True)
    of_baseline = [processor.get(key) for key in keys]
    frame["fp32_processor"] = pd.Series(of_baseline, frame.index, dtype=object)
    return frame.sort_values(ORDER, kind="stable")


def processor_of_each(frame: pd.DataFrame) -> pd.Series:
    """Name the processor of each row; clouds give different processors the same name."""
    isa = frame["isa"].astype(object).fillna("")
    several = isa.groupby(frame["cpu"]).transform("nunique") > 1
    return frame["cpu"].where(~several, frame["cpu"] + " with " + isa)


def _labels(entries: dict) -> dict[str, str]:
    """Labels by name."""
    return {name: entry.label for name, entry in entries.items()}


def _suffix(frame: pd.DataFrame) -> pd.Series:
    """Mark the labels of simulated runs, if their backend does not say so, and of GPU runs."""
    unsaid = frame["simulated"] & (frame["backend"] != "simulated")
    simulated = unsaid.map({True: " (simulated)", False: ""})
    return simulated + frame["device"].map({"cuda": " on GPU"}).fillna("")


def _table(path: Path) -> pd.DataFrame:
    """Read results.csv; raises `UserError` if it is missing, damaged or of another version."""
    if not path.exists():
        studies = sorted(table.parent.name for table in path.parents[1].glob("*/results.csv"))
        raise UserError(
            f"there is no {path}. Run the scripts first, or give --study; studies there: "
            f"{', '.join(studies) or 'none yet'}."
        )
    again = "any script of the study rebuilds it."
    try:
        frame = pd.read_csv(
            path,
            dtype=TYPES,
            na_values=dict.fromkeys(set(results.COLUMNS) - set(TEXTS), ""),
            keep_default_na=False,
        )
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); {again}") from None
    missing = [name for name in results.COLUMNS if name not in frame]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{path} lacks the columns {names}; {again}")
    if frame.empty:
        raise UserError(f"{path} holds no runs yet.")
    for column, known in NAMES.items():
        unknown = sorted(set(frame[column].astype(str)) - set(known))
        if unknown:
            raise UserError(
                f"{path} names the {column} {', '.join(unknown)}, which utils/catalog.py does not "
                "have."
            )
    return frame


def one_batch(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Select one row per variant, of its lowest seed; also return the batch size.

    The rows are timed on all threads at the smallest batch size. A run that was only timed in other
    ways keeps a row, with empty times.
    """
    one, batch = of_all_seeds(frame)
    return first_seed(one), batch


def of_all_seeds(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Select one row per run, as `one_batch` does for the lowest seeds."""
    batch = frame["batch_size"].min()
    smallest = frame["batch_size"].eq(batch).fillna(False)
    frame = frame.assign(timed=frame["threads"].eq(frame["threads"].max()) & smallest)
    frame = frame.sort_values("timed", ascending=False, kind="stable").drop_duplicates(RUN)
    empty = {name: frame[name].where(frame["timed"]) for name in frame.columns.intersection(TIMING)}
    return frame.assign(**empty).drop(columns="timed").sort_values(ORDER, kind="stable"), batch


def first_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of each model and series with the lowest seed."""
    lowest = frame.groupby(["model", "series"], observed=True)["seed"].transform("min")
    return frame[frame["seed"] == lowest]


def usual(frame: pd.DataFrame) -> pd.DataFrame:
    """Select one run per model, method and format, with one backend for all models.

    It is the run of the lowest seed on the backend that most models ran on; if there are several,
    on the fastest (see `speed`), or the first in the catalog.
    """
    one, _ = one_batch(frame)
    order = []
    for model, method, dtype, backend in one[ORDER].itertuples(index=False):
        backends = (*catalog.Run(model, method, dtype).backends, backend)
        order.append(backends.index(backend))
    models = one.groupby(DEPLOYED, observed=True)["model"].transform("nunique")
    one = one.assign(models=-models, slowness=-speed(one), order=order)
    one = one.sort_values(["models", "slowness", "order"], kind="stable")
    one = one.drop_duplicates(["model", "method", "dtype"])
    return one.drop(columns=["models", "slowness", "order"]).sort_values(ORDER, kind="stable")


def speed(one: pd.DataFrame) -> pd.Series:
    """Mean log speed-up over the fastest FP32, per method, format and backend.

    If a run of a method and format was not timed, as with simulated runs, all backends of this
    method and format count as equally fast.
    """
    ratios = np.log(one["speedup_vs_best_fp32"])
    timed = ratios.notna().groupby([one["method"], one["dtype"]], observed=True).transform("all")
    deployed = [one[name] for name in DEPLOYED]
    return ratios.groupby(deployed, observed=True).transform("mean").where(timed, 0.0)


def quantized(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the rows whose method quantizes."""
    quantizing = [name for name, method in catalog.METHODS.items() if method.quantizes]
    return frame[frame["method"].isin(quantizing)]


def present(frame: pd.DataFrame) -> list[str]:
    """List the models of a frame in the catalog's order."""
    return [name for name in catalog.MODELS if name in set(frame["model"])]


def labels(frame: pd.DataFrame, column: str = "series") -> list[str]:
    """List the rows of a dot plot: every variant of any model, so that gaps show."""
    return list(frame.sort_values(DEPLOYED, kind="stable")[column].unique())


def classes(frame: pd.DataFrame) -> tuple[str, str]:
    """Names of the negative and the positive class."""
    return frame["negative_class"].iloc[0], frame["positive_class"].iloc[0]


def is_dissertations(frame: pd.DataFrame) -> bool:
    """Whether the study uses the dissertation's data set, so its figures compare."""
    return studies.is_dissertations(frame["study"].iloc[0])


def setting(frame: pd.DataFrame) -> str:
    """Name the images, processors and threads of the measurements."""
    row, threads = frame.iloc[0], frame["threads"].max()
    images = "drawn images" if row["study"].startswith("drawn") else row["study"].replace("_", " ")
    number = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{row['n_test']} test images ({images}), {processors(frame)}, {number}"


def processors(frame: pd.DataFrame) -> str:
    """Name the processor of the rows; several processors with their numbers of runs."""
    runs = frame.drop_duplicates([*RUN, "processor"]).groupby("processor", sort=False).size()
    if len(runs) < 2:
        return "".join(runs.index) or "unknown processor"
    return ", ".join(
        f"{cpu} ({number} run)" if number == 1 else f"{cpu} ({number} runs)"
        for cpu, number in runs.items()
    )
