"""The tables of a study: all in results/STUDY/tables.md, and each as CSV and LaTeX in results/STUDY/tables/.

python figures/tables.py --study cats_and_dogs
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import compare
import latex
import pandas as pd
import style
from cells import MS, POINTS, latency, markdown, notes, p_value, percent, text, with_interval

from utils import cli, paths, results
from utils.errors import UserError

# The rows of a model's table, and its title.
QUALITY = {
    "ptq": (("fp32", "ptq"), "post-training quantization"),
    "qat": (("fp32", "control", "qat"), "quantization-aware training"),
}
MEANING = (
    "Precision, recall and F1 are those of the dog. Times, images/s and peak memory (of the process) are at the smallest batch "
    "size, images/s also at the best one. Quantized modules: of all convolutions and linear layers. "
)
CONTROL = (
    "Control: FP32 fine-tuned as QAT is, which is what more training alone gives. Before conversion: the accuracy of the network "
    "that QAT trained, which rounds in FP32. "
)
SPEED = (
    "x eager FP32, x best FP32: how many times faster than PyTorch's FP32, and than the engine named, the fastest FP32 of this "
    "machine for these threads and this batch size; below 1 is slower. "
)
NOTES = {  # what is said about the words in a column `note`
    "simulated": "Simulated: 16-bit integers carried in FP32, whose speed says nothing; none is given. ",
    "contended": "Contended: something else was running, so do not rely on the time. ",
    "emulated": "Emulated: this processor has no FP16 arithmetic. ",
    "qnnpack": "qnnpack off ARM: stands for ARM's numerics, not for its speed. ",
    "timed otherwise": "Timed otherwise: at other batch sizes or threads only, not comparable here. ",
}


class Table(NamedTuple):
    """What becomes NAME.csv, NAME.tex and a part of tables.md."""

    name: str
    title: str
    note: str  # a line that explains it
    cells: pd.DataFrame  # strings


def main():
    frame, args = style.load(__doc__)
    heading, setting = style.title(frame, f"Study {args.study}").split("\n")
    try:
        tables = [finished(table) for table in tables_of(frame, args.results / args.study)]
    except UserError as error:
        sys.exit(f"error: {error}")
    write(tables, heading, setting, args)


def write(tables: list[Table], heading: str, setting: str, args: argparse.Namespace) -> None:
    folder = args.results / args.study
    top = f"# {heading}\n\n{setting}. In brackets: 95 % intervals. An empty cell: there is no such value.\n"
    parts = [f"## {table.title}\n\n{table.note}\n\n{markdown(table.cells)}\n" for table in tables]
    paths.write_text(folder / "tables.md", "\n".join([top, *parts]))
    for table in tables:
        label = "tab:" + re.sub(r"[\W_]+", "-", f"{args.study}-{table.name}")
        note = f"{table.note} {setting}. In brackets: 95 % intervals."
        paths.write_text(folder / "tables" / f"{table.name}.csv", table.cells.to_csv(index=False, lineterminator="\n"))
        paths.write_text(folder / "tables" / f"{table.name}.tex", latex.table(table.cells, table.title, note, label))
    print(f"{top}\n{parts[0]}\nwritten: {folder / 'tables.md'}, and each of its {len(tables)} tables in {folder / 'tables'}")


def finished(table: Table) -> Table:
    """The table without columns in which no row has anything, its note explaining the words that are in it."""
    cells = table.cells.loc[:, (table.cells != "").any()]
    words = " ".join(cells.get("note", []))
    note = table.note.strip() + "".join(f" {meaning.strip()}" for word, meaning in NOTES.items() if word in words)
    return table._replace(note=note, cells=cells)


def tables_of(frame: pd.DataFrame, folder: Path) -> Iterator[Table]:
    """All tables that the runs of a study are enough for."""
    frame = named(frame)
    one, batch = style.one_batch(frame)
    yield Table("headline", "In short", *headline(one, batch))
    yield Table("summary", "All variants", *summary(one, batch))
    for model in one["model"].unique():
        name, own = style.MODELS[model], one[one["model"] == model]
        for method, (methods, title) in QUALITY.items():
            if (own["method"] == method).any():
                cells = quality(own[own["method"].isin(methods)], frame, batch)
                yield Table(f"{model}_{method}", f"{name}: {title}", CONTROL * (method == "qat") + MEANING, cells)
        timed = frame[frame["model"] == model].dropna(subset="latency_ms_p50")
        if not timed.empty:
            yield Table(f"{model}_speedup", f"{name}: speed", f"Time of one batch in ms. {SPEED}", speedup(timed))
        gains = compare.gain(own, folder / "runs")
        if not gains.empty:
            yield Table(f"{model}_gain", f"{name}: quantization-aware against post-training", compare.GAIN, gains)
    if not one["study"].iloc[0].startswith("drawn"):  # the dissertation's images were photographs
        yield Table("published", "Against the dissertation", *compare.against_published(one))
    repeated = over_seeds(one)
    if repeated is not None:
        yield Table("over_seeds", "Over seeds", "Accuracy in %; std: its standard deviation in points.", repeated)


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `run`, the name of a run's files, and `variant`, which says the seed where there are several."""
    seed = ", seed " + frame["seed"].astype(str) if frame["seed"].nunique() > 1 else ""
    return frame.assign(variant=frame["series"] + seed, run=[results.run_id(row) for row in frame.to_dict("records")])


def headline(one: pd.DataFrame, batch: int) -> tuple[str, pd.DataFrame]:
    """The note and the cells of what each script gives on its default engine: the table to begin with."""
    usual = [cli.BACKENDS.get((method, dtype), ("",))[0] for method, dtype in zip(one["method"], one["dtype"], strict=True)]
    own = one[one["backend"] == usual]
    cells = {
        "model": own["model"].astype(str).map(style.MODELS),
        "variant": own["variant"],
        "accuracy %": with_interval(own, "accuracy", "{:.2f}", 100),
        "points to FP32": with_interval(own, "accuracy_difference", POINTS, 100),
        "verdict": own["verdict"].astype(object).fillna(""),
        "MiB": text(own["size_mb"]),
        **latency(own, f"ms at batch {batch}"),
        "note": notes(own),
    }
    return "Each script's run on its default engine. The table of all variants explains the columns.", pd.DataFrame(cells)


def summary(one: pd.DataFrame, batch: int) -> tuple[str, pd.DataFrame]:
    """The note and the cells of the table of everything."""
    whole = one["size_mb"].where(one["method"] == "fp32").groupby([one["model"], one["seed"]], observed=True).transform("first")
    cells = {
        "model": one["model"].astype(str).map(style.MODELS),
        "variant": one["variant"],
        "accuracy %": with_interval(one, "accuracy", "{:.2f}", 100),
        "points to FP32": with_interval(one, "accuracy_difference", POINTS, 100),
        "p": p_value(one["mcnemar_p_holm"]),
        "verdict": one["verdict"].astype(object).fillna(""),
        "agrees %": percent(one["agreement_fp32"]),
        "SQNR dB": text(one["sqnr_db"], "{:.1f}"),
        "MiB": text(one["size_mb"]),
        "smaller by %": text(100 * (1 - one["size_mb"] / whole), "{:.1f}"),
        **latency(one, f"ms at batch {batch}"),
        "note": notes(one),
    }
    judged = (
        "Points to FP32: on the same images (paired bootstrap interval). p: exact McNemar test, after Holm over the study. "
        f"Verdict: held, not worse than FP32 by more than the {100 * one['margin'].max():g} points declared beforehand; lost, "
        "worse by more; undecided, the interval leaves both open. Agrees: decides as FP32 does. SQNR: of the logits; empty, "
        "nothing differs. "
    )
    known = "" if one["margin"].isna().all() else judged
    return f"{known}{SPEED}Eager FP32 over itself shows how exact that is.", pd.DataFrame(cells)


def quality(own: pd.DataFrame, frame: pd.DataFrame, batch: int) -> pd.DataFrame:
    """A model's baseline and what became of it by one method."""
    best = frame.dropna(subset="offline_ips").drop_duplicates("run").set_index("run")
    best = text(best["offline_ips"], "{:.1f}") + " (batch " + text(best["batch_size"], "{}") + ")"
    cells = {
        "variant": own["variant"],
        "accuracy %": with_interval(own, "accuracy", "{:.2f}", 100),
        "before conversion %": percent(own["accuracy_fake_quant"]),
        **{f"{name} %": percent(own[name.lower()]) for name in ("precision", "recall", "F1")},
        f"ms at batch {batch}": with_interval(own, "latency_ms_p50", MS, bounds="latency_ms"),
        "images/s": text(own["throughput_ips"], "{:.1f}"),
        "best images/s": own["run"].map(best).astype(object).fillna(""),
        "MiB": text(own["size_mb"]),
        "parameters": text(own["parameters"], "{:,.0f}"),
        "peak MiB": text(own["peak_memory_mb"], "{:.0f}"),
        "quantized modules": text(own["quantized_modules"], "{:.0f} of ") + text(own["weight_modules"], "{:.0f}"),
        "note": notes(own),
    }
    return pd.DataFrame(cells)


def speedup(timed: pd.DataFrame) -> pd.DataFrame:
    """Every time that was taken of a model."""
    timed = timed.sort_values(["method", "dtype", "backend", "device", "seed", "threads", "batch_size"], kind="stable")
    where = {"variant": timed["variant"], "threads": text(timed["threads"], "{}"), "batch": text(timed["batch_size"], "{}")}
    return pd.DataFrame(where | latency(timed, "ms") | {"note": notes(timed)})


def over_seeds(one: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and spread of the accuracy of what was run with more than one seed; None where nothing was."""
    one = one.assign(model=one["model"].astype(str), accuracy=100 * one["accuracy"])
    found = one.groupby(["model", "series"], sort=False)["accuracy"].agg(["count", "mean", "std", "min", "max"]).reset_index()
    found = found[found["count"] > 1]
    if found.empty:
        return None
    spread = {name: text(found[name]) for name in ("mean", "std", "min", "max")}
    cells = {"model": found["model"].map(style.MODELS), "variant": found["series"], "seeds": text(found["count"], "{}")}
    return pd.DataFrame(cells | spread)


if __name__ == "__main__":
    main()
