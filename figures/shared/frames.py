"""results.csv as a data frame, and selections from it. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

from pathlib import Path

import numpy as np
import pandas as pd

from utils import catalog, results, studies
from utils.errors import UserError

RUN = ["model", "method", "dtype", "backend", "device", "seed"]  # columns that tell runs apart
ORDER = RUN[:4]
DEPLOYED = ORDER[1:]  # what models have in common
TIMING = [
    name
    for section, names in results.SECTIONS
    if section == "timing"
    for name in names
    if name != "threads"
]
TEXTS = (
    "study",
    "negative_class",
    "positive_class",
)  # read as they are: a class may be called "NA" or "1"
TYPES = dict.fromkeys(TEXTS, str) | {
    "batch_size": "Int64"
}  # which is empty where nothing was timed
NAMES = {
    "model": catalog.MODELS,
    "method": catalog.METHODS,
    "dtype": catalog.FORMATS,
    "backend": catalog.BACKENDS,
}


def read(path: Path) -> pd.DataFrame:
    """Read results.csv in the catalog's order and add columns.

    `series` is a label, "INT8 PTQ fbgemm", and `deployment` the same without the method. `processor`
    is `cpu`, with its instruction sets where one name stands for several processors;
    `fp32_processor` is that of the FP32 run that a row is compared with.
    """
    frame = _table(path)
    for column in ("model", "method"):
        frame[column] = pd.Categorical(frame[column], list(NAMES[column]), ordered=True)
    dtype = frame["dtype"].map(_labels(catalog.FORMATS))
    method = frame["method"].astype(str).map(_labels(catalog.METHODS) | {"fp32": ""})
    unsaid = frame["simulated"] & (frame["backend"] != "simulated")
    suffix = unsaid.map({True: " (simulated)", False: ""}) + frame["device"].map(
        {"cuda": " on GPU"}
    ).fillna("")
    frame["series"] = (dtype + " " + method + " " + frame["backend"]).str.split().str.join(
        " "
    ) + suffix
    frame["deployment"] = dtype + " " + frame["backend"] + suffix
    frame["processor"] = processor_of_each(frame)
    baselines = frame[frame["method"] == "fp32"].drop_duplicates(["model", "device", "seed"])
    processor = baselines.set_index(["model", "device", "seed"])["processor"].to_dict()
    keys = zip(frame["model"], frame["device"], frame["seed"], strict=True)
    frame["fp32_processor"] = pd.Series(
        [processor.get(key) for key in keys], frame.index, dtype=object
    )
    return frame.sort_values(ORDER, kind="stable")


def processor_of_each(frame: pd.DataFrame) -> pd.Series:
    """Name the processor of each row; clouds call different ones by the same name."""
    isa = frame["isa"].astype(object).fillna("")
    several = isa.groupby(frame["cpu"]).transform("nunique") > 1
    return frame["cpu"].where(~several, frame["cpu"] + " with " + isa)


def _labels(entries: dict) -> dict[str, str]:
    """Labels by name."""
    return {name: entry.label for name, entry in entries.items()}


def _table(path: Path) -> pd.DataFrame:
    """Read results.csv; raise `UserError` where it is missing, damaged or of another version."""
    if not path.exists():
        studies = (
            ", ".join(sorted(table.parent.name for table in path.parents[1].glob("*/results.csv")))
            or "none yet"
        )
        raise UserError(
            f"there is no {path}. Run the scripts first, or give --study; studies there: {studies}."
        )
    again = "any script of the study rebuilds it."
    try:
        frame = pd.read_csv(path, dtype=TYPES, na_values=dict.fromkeys(set(results.COLUMNS) - set(TEXTS), ""),
            keep_default_na=False)  # fmt: skip
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); {again}") from None
    missing = [name for name in results.COLUMNS if name not in frame]
    if missing:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}; {again}"
        )
    if frame.empty:
        raise UserError(f"{path} holds no runs yet.")
    for column, known in NAMES.items():
        unknown = sorted(set(frame[column].astype(str)) - set(known))
        if unknown:
            raise UserError(
                f"{path} names the {column} {', '.join(unknown)}, which utils/catalog.py does not have."
            )
    return frame


def one_batch(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Select one row for each variant: of the lowest seed, on all threads, at the smallest batch size; return that too.

    A run that was only timed at others keeps a row, with empty times.
    """
    one, batch = of_all_seeds(frame)
    return first_seed(one), batch


def of_all_seeds(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Select one row for each run, as `one_batch` does for the lowest seeds."""
    batch = frame["batch_size"].min()
    timed = frame["threads"].eq(frame["threads"].max()) & frame["batch_size"].eq(batch).fillna(
        False
    )
    frame = (
        frame.assign(timed=timed)
        .sort_values("timed", ascending=False, kind="stable")
        .drop_duplicates(RUN)
    )
    empty = {name: frame[name].where(frame["timed"]) for name in frame.columns.intersection(TIMING)}
    return frame.assign(**empty).drop(columns="timed").sort_values(ORDER, kind="stable"), batch


def first_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of each model and series with the lowest seed."""
    lowest = frame.groupby(["model", "series"], observed=True)["seed"].transform("min")
    return frame[frame["seed"] == lowest]


def usual(frame: pd.DataFrame) -> pd.DataFrame:
    """Select one run for each model, method and format, of the lowest seed, so that models are shown on the same backend.

    It is the backend on which most models ran; of several, the fastest (`speed`), or the next in the catalog.
    """
    one, _ = one_batch(frame)
    kinds = zip(one["model"], one["method"], one["dtype"], strict=True)
    order = [
        (*catalog.Run(*kind).backends, name).index(name)
        for kind, name in zip(kinds, one["backend"], strict=True)
    ]
    models = one.groupby(DEPLOYED, observed=True)["model"].transform("nunique")
    one = one.assign(models=-models, slowness=-speed(one), order=order)
    one = one.sort_values(["models", "slowness", "order"], kind="stable").drop_duplicates(
        ["model", "method", "dtype"]
    )
    return one.drop(columns=["models", "slowness", "order"]).sort_values(ORDER, kind="stable")


def speed(one: pd.DataFrame) -> pd.Series:
    """Mean logarithm of the speed-up over the fastest FP32 of all runs of a row's method, format and backend.

    Where a run of a method and format was not timed, as simulated ones are not, all its backends count as equally fast.
    """
    ratios = np.log(one["speedup_vs_best_fp32"])
    timed = ratios.notna().groupby([one["method"], one["dtype"]], observed=True).transform("all")
    return (
        ratios.groupby([one[name] for name in DEPLOYED], observed=True)
        .transform("mean")
        .where(timed, 0.0)
    )


def quantized(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the rows whose method quantizes."""
    return frame[
        frame["method"].isin([name for name, method in catalog.METHODS.items() if method.quantizes])
    ]


def present(frame: pd.DataFrame) -> list[str]:
    """List the models of a frame in the catalog's order."""
    return [name for name in catalog.MODELS if name in set(frame["model"])]


def labels(frame: pd.DataFrame, column: str = "series") -> list[str]:
    """List the rows of a dot plot: all that any model was run with, so that gaps show."""
    return list(frame.sort_values(["method", "dtype", "backend"], kind="stable")[column].unique())


def classes(frame: pd.DataFrame) -> tuple[str, str]:
    """Names of the negative and the positive class."""
    return frame["negative_class"].iloc[0], frame["positive_class"].iloc[0]


def is_dissertations(frame: pd.DataFrame) -> bool:
    """Whether the rows are of the dissertation's data set, whose figures compare with them."""
    return studies.is_dissertations(frame["study"].iloc[0])


def setting(frame: pd.DataFrame) -> str:
    """Say on which images, processors and threads the rows were measured."""
    row, threads = frame.iloc[0], frame["threads"].max()
    images = "drawn images" if row["study"].startswith("drawn") else row["study"].replace("_", " ")
    number = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{row['n_test']} test images ({images}), {processors(frame)}, {number}"


def processors(frame: pd.DataFrame) -> str:
    """Name the processor of the rows; where there are several, each with its number of runs."""
    runs = frame.drop_duplicates([*RUN, "processor"]).groupby("processor", sort=False).size()
    if len(runs) < 2:
        return "".join(runs.index) or "unknown processor"
    return ", ".join(f"{cpu} ({number} run{'s' * (number > 1)})" for cpu, number in runs.items())
