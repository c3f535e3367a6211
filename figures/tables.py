"""Tables of a study: all of them in tables.md, and each as CSV and LaTeX in tables/.

    python figures/tables.py --study cats_and_dogs
    python figures/tables.py --study mine --against cats_and_dogs

With --against, an additional table compares the study with another one of the same experiments, run
by run: accuracy, difference to FP32, speed-up and size, and the differences in images, versions and
processor.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import cells, compare, frames, latex, reproduced, script, seeds
from figures.shared.cells import MS, POINTS, latency, notes, p_value, percent, text, with_interval
from utils import catalog, caveats, paths, results

PERCENT = "{:.2f}"
FIRST_COLUMNS = ("model", "variant", "threads", "batch", "note")
MEANING = (
    "Precision, recall and F1 are for the class {positive}. Times, images/s and peak memory (of "
    "the process) are at the smallest batch size, images/s also at the best one. Integer layers: "
    "convolutions and linear layers that the engine computes on integers, of all of them, read "
    "from its compiled graph; empty if the engine does not say. "
)
CONTROL = (
    "Control: FP32 fine-tuned like QAT, which shows what additional training alone gains. Before "
    "conversion: the accuracy of the network that QAT trained, which rounds in FP32. "
)
SPEED = (
    "x eager FP32, x same engine, x best FP32: how many times faster than PyTorch's FP32, than "
    "FP32 on the engine of the row, and than the named engine, the fastest FP32 of this machine "
    "for these threads and this batch size, one for all rows of a model; below 1 is slower. "
)
HEADLINE = (
    "For each method and format, the engine on which most models ran; if there are several, the "
    "one that is fastest over all models. The table of all variants explains the columns."
)
JUDGED = (
    "Points to FP32: on the same images (paired bootstrap interval). p: exact McNemar test, "
    "Holm-adjusted over the study. Verdict: held, not worse than FP32 by more than the {points:g} "
    "points declared beforehand; lost, worse by more; undecided, the interval contains the margin. "
    "Agrees: same decision as FP32. SQNR: of the logits; empty if nothing differs. "
)
EXACTNESS = "Eager FP32 over itself shows how exact that is."
LOWEST = (
    "A variant that was trained with several seeds is shown with the lowest; the table over seeds "
    "has them all. "
)
SEEDS = (
    "Accuracy, and points to the FP32 network of the same seed, as means over seeds; intervals for "
    "other seeds and other images together. std: standard deviation of the accuracy over seeds, in "
    "points. "
)


class Table(NamedTuple):
    """Content of NAME.csv, NAME.tex and a section of tables.md."""

    name: str
    title: str
    note: str  # explains it
    cells: pd.DataFrame  # strings


def add_options(parser):
    """Add the option of this script."""
    parser.add_argument("--against", metavar="STUDY", help="a study, or its folder")


def make(frame, args):
    tables = tables_of(frame, args.results / args.study)
    if other := getattr(args, "against", None):  # figures/all.py does not offer it
        tables.insert(0, against(frame, args, other))
    write(tables, f"Study {args.study}", frame, args)


def against(frame: pd.DataFrame, args, other: str) -> Table:
    """Table that compares the study with another: its name in --results, or its folder."""
    folder = Path(other) if Path(other).is_dir() else args.results / other
    ours = reproduced.Study(args.study, frame, args.results / args.study)
    theirs = reproduced.Study(other, frames.read(folder / "results.csv"), folder)
    cells = reproduced.comparison(ours, theirs)
    return Table("against", f"Next to {other}", *cells)


def write(tables: list[Table], heading: str, frame: pd.DataFrame, args) -> None:
    """Write the tables in all formats, and print the first one."""
    folder, setting, sessions = (
        script.tables_folder(args),
        frames.setting(frame),
        of_sessions(frame),
    )
    top = (
        f"# {heading}\n\n{setting}. Brackets hold 95 % intervals. A cell is empty if a run has no "
        f"value for it. {sessions}\n"
    )
    parts = [
        f"## {table.title}\n\n{table.note}\n\n{cells.markdown(table.cells)}\n" for table in tables
    ]
    paths.write_text(folder / "tables.md", "\n".join([top, *parts]))
    for table in tables:
        label = "tab:" + re.sub(r"[\W_]+", "-", f"{args.study}-{table.name}")
        note = f"{table.note} {setting}. In brackets: 95 % intervals."
        as_csv = table.cells.to_csv(index=False, lineterminator="\n")
        paths.write_text(folder / "tables" / f"{table.name}.csv", as_csv)
        as_latex = latex.table(table.cells, table.title, note, label)
        paths.write_text(folder / "tables" / f"{table.name}.tex", as_latex)
    print(
        f"{top}\n{parts[0]}\nwritten: {folder / 'tables.md'}, and each of its {len(tables)} tables "
        f"in {folder / 'tables'}"
    )


def of_sessions(frame: pd.DataFrame) -> str:
    """Say what the intervals of times cover: launches of one session, or several sessions."""
    counts = frame["n_sessions"].dropna()
    if counts.empty:
        return "Nothing was timed."
    if counts.max() == 1:
        return (
            "Every row was timed in one session: intervals of times cover its launches, and "
            "another day may differ by more."
        )
    if counts.min() == 1:
        several = f"{(counts > 1).sum()} of {len(counts)} rows were timed in several sessions"
        return (
            f"{several}, and their intervals cover other days. The intervals of the other rows "
            "cover the launches of one session only."
        )
    return f"Rows were timed in {counts.min():.0f} sessions or more, which their intervals cover."


def tables_of(frame: pd.DataFrame, folder: Path) -> list[Table]:
    """All tables that a study has enough runs for; the runs are in `folder`."""
    margin = None if frame["margin"].isna().all() else frame["margin"].max()
    return [finished(table, margin) for table in drafts(frame, folder)]


def finished(table: Table, margin: float | None) -> Table:
    """Drop empty columns, put `note` next to the name and explain the caveats in it."""
    content = table.cells.loc[:, (table.cells != "").any()]
    first = [name for name in FIRST_COLUMNS if name in content]
    content = content[first + [name for name in content if name not in first]]
    noted = set("; ".join(content.get("note", [])).split("; "))
    note = " ".join([table.note.strip(), *caveats.explained(noted, margin)])
    return table._replace(note=note, cells=content)


def drafts(frame: pd.DataFrame, folder: Path) -> Iterator[Table]:
    """Yield the tables before they are `finished`: for the lowest seeds, and one over seeds."""
    every, _ = frames.of_all_seeds(frame)
    frame = named(frames.first_seed(frame))
    one, batch = frames.one_batch(frame)
    yield Table("headline", "In short", *headline(one, batch))
    note, content = summary(one, batch)
    if len(every) > len(one):
        note = LOWEST + note
    yield Table("summary", "All variants", note, content)
    for model in frames.present(one):
        yield from drafts_of_model(model, frame, one, folder)
    if frames.is_dissertations(one):
        yield Table("published", "Against the dissertation", *compare.against_published(one))
    repeated = seeds.together(every, folder / "runs")
    if not repeated.empty:
        yield Table("over_seeds", "Over seeds", SEEDS, over_seeds(repeated))


def drafts_of_model(
    model: str, frame: pd.DataFrame, one: pd.DataFrame, folder: Path
) -> Iterator[Table]:
    """Yield a model's tables: quality by each method, speed, and QAT against PTQ."""
    label, runs = catalog.MODELS[model].label, one[one["model"] == model]
    meaning = MEANING.format(positive=frames.classes(frame)[1])
    for name, method in catalog.METHODS.items():
        if method.quantizes and (runs["method"] == name).any():
            content = quality(runs[runs["method"].isin((*method.compared_with, name))], frame)
            note = CONTROL + meaning if "control" in method.compared_with else meaning
            yield Table(f"{model}_{name}", f"{label}: {method.title}", note, content)
    timed = frame[frame["model"] == model].dropna(subset="latency_ms_p50")
    if not timed.empty:
        note = f"Time of one batch in ms. {SPEED}"
        yield Table(f"{model}_speedup", f"{label}: speed", note, speedup(timed))
    gains = compare.gain(runs, folder / "runs")
    if not gains.empty:
        title = f"{label}: quantization-aware against post-training"
        yield Table(f"{model}_gain", title, compare.GAIN, gains)


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the name of each run's files, and labels that distinguish seeds.

    `run` is the name, `variant` the label, and `deployed` the label without the method.
    """
    seed = ", seed " + frame["seed"].astype(str) if frame["seed"].nunique() > 1 else ""
    labels = {"variant": frame["series"] + seed, "deployed": frame["deployment"] + seed}
    return frame.assign(**labels, run=[results.run_id(row) for row in frame.to_dict("records")])


def model_labels(frame: pd.DataFrame) -> pd.Series:
    """Labels of the models of a frame's rows."""
    labels = [catalog.MODELS[model].label for model in frame["model"]]
    return pd.Series(labels, frame.index, dtype=str)


def words(column: pd.Series) -> pd.Series:
    """Texts of a column, empty if they are missing."""
    return column.astype(object).fillna("")


def headline(one: pd.DataFrame, batch: int) -> tuple[str, pd.DataFrame]:
    """Note and cells of the first table: one run per script, on one engine for all models."""
    usual = frames.usual(one)
    content = {
        "model": model_labels(usual),
        "variant": usual["variant"],
        "accuracy %": with_interval(usual, "accuracy", PERCENT, 100),
        "points to FP32": with_interval(usual, "accuracy_difference", POINTS, 100),
        "verdict": words(usual["verdict"]),
        "MiB": text(usual["size_mb"]),
        **latency(usual, f"ms at batch {batch}"),
        "note": notes(usual),
    }
    return HEADLINE, pd.DataFrame(content)


def summary(one: pd.DataFrame, batch: int) -> tuple[str, pd.DataFrame]:
    """Note and cells of the table of all variants."""
    fp32_sizes = one["size_mb"].where(one["method"] == "fp32")
    same = fp32_sizes.groupby([one["model"], one["seed"]], observed=True)
    whole = same.transform("first")
    content = {
        "model": model_labels(one),
        "variant": one["variant"],
        "accuracy %": with_interval(one, "accuracy", PERCENT, 100),
        "points to FP32": with_interval(one, "accuracy_difference", POINTS, 100),
        "p": p_value(one["mcnemar_p_holm"]),
        "verdict": words(one["verdict"]),
        "agrees %": percent(one["agreement_fp32"]),
        "SQNR dB": text(one["sqnr_db"], "{:.1f}"),
        "MiB": text(one["size_mb"]),
        "smaller by %": text(100 * (1 - one["size_mb"] / whole), "{:.1f}"),
        **latency(one, f"ms at batch {batch}"),
        "note": notes(one),
    }
    note = SPEED + EXACTNESS
    if one["margin"].notna().any():
        note = JUDGED.format(points=100 * one["margin"].max()) + note
    return note, pd.DataFrame(content)


def quality(runs: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Cells of a model's baseline and of its variants by one method."""
    fastest = frame.dropna(subset="offline_ips").drop_duplicates("run").set_index("run")
    batches = " (batch " + text(fastest["batch_size"], "{}") + ")"
    best = text(fastest["offline_ips"], "{:.1f}") + batches
    times = with_interval(runs, "latency_ms_p50", MS, bounds="latency_ms")
    modules = runs["weight_modules"].where(runs["integer_layers"].notna())
    integers = text(runs["integer_layers"], "{:.0f} of ") + text(modules, "{:.0f}")
    content = {
        "variant": runs["variant"],
        "accuracy %": with_interval(runs, "accuracy", PERCENT, 100),
        "before conversion %": percent(runs["accuracy_fake_quant"]),
        "precision %": percent(runs["precision"]),
        "recall %": percent(runs["recall"]),
        "F1 %": percent(runs["f1"]),
        f"ms at batch {frame['batch_size'].min()}": times,
        "images/s": text(runs["throughput_ips"], "{:.1f}"),
        "best images/s": words(runs["run"].map(best)),
        "MiB": text(runs["size_mb"]),
        "parameters": text(runs["parameters"], "{:,.0f}"),
        "peak MiB": text(runs["peak_memory_mb"], "{:.0f}"),
        "integer layers": integers,
        "note": notes(runs),
    }
    return pd.DataFrame(content)


def speedup(timed: pd.DataFrame) -> pd.DataFrame:
    """Cells of all times of a model."""
    order = ["method", "dtype", "backend", "device", "seed", "threads", "batch_size"]
    timed = timed.sort_values(order, kind="stable")
    content = {
        "variant": timed["variant"],
        "threads": text(timed["threads"], "{}"),
        "batch": text(timed["batch_size"], "{}"),
        **latency(timed, "ms"),
        "note": notes(timed),
    }
    return pd.DataFrame(content)


def over_seeds(repeated: pd.DataFrame) -> pd.DataFrame:
    """Cells of the variants that were trained with several seeds."""
    content = {
        "model": model_labels(repeated),
        "variant": repeated["series"],
        "seeds": text(repeated["seeds"], "{}"),
        "mean %": with_interval(repeated, "accuracy", PERCENT, 100),
        "std": text(100 * repeated["std"]),
        "points to FP32": with_interval(repeated, "accuracy_difference", POINTS, 100),
        "verdict": words(repeated["verdict"]),
    }
    return pd.DataFrame(content)


if __name__ == "__main__":
    script.run(make, __doc__, add_options)
