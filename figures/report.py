"""One page for a study: what was found, every number, the figures, and where they come from, in a file that needs no network.

python figures/report.py --study cats_and_dogs

Run it last: it shows the PNGs that are in the folder of the study's figures.
"""

import ast
import base64
import csv
import hashlib
import struct
import sys
from pathlib import Path

import cells
import jinja2
import pandas as pd
import style
import tables

from utils import paths, results
from utils.errors import UserError

# Columns that the page shows before one asks for all; of `device` and `seed` only what varies.
SHOWN = (
    "model", "method", "dtype", "backend", "device", "seed", "threads", "batch_size", "accuracy", "accuracy_difference",
    "verdict", "mcnemar_p_holm", "sqnr_db", "latency_ms_p50", "speedup_vs_eager_fp32", "speedup_vs_best_fp32", "size_mb",
    "simulated", "contended",
)  # fmt: skip
FILTERS = ("model", "method", "dtype", "backend")
QUANTIZED = ("int8", "fp16", "int16")  # in the order of the findings
VERDICTS = ("held", "undecided", "lost")
REFERENCES = {"speedup_vs_eager_fp32": "eager FP32", "speedup_vs_best_fp32": "the best FP32"}


def main():
    frame, args = style.load(__doc__)
    folder = args.results / args.study
    try:
        records = read(folder / "runs")
        short, summary, *others = [shown(tables.finished(table)) for table in tables.tables_of(frame, folder)]
    except UserError as error:
        sys.exit(f"error: {error}")
    frame = tables.named(frame)
    one, _ = style.one_batch(frame)
    # strict: a name that the template knows and this script does not is a mistake, not an empty place
    options = dict(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **options)
    page = environment.get_template("report.html.j2").render(
        study=args.study.replace("_", " "),
        smoke=args.study.endswith("_smoke"),
        headline=headline(frame, one),
        findings=findings(frame, one),
        notes=notes(frame, one),
        facts=facts(frame, one),
        short=short,
        summary=summary,
        others=others,
        figures=figures(args.out, frame),
        table=everything(folder / "results.csv"),
        machines=machines(records),
        provenance=provenance(records, folder / "results.csv"),
    )
    path = args.out / "report.html"
    paths.write_text(path, page + "\n")
    print(f"written: {path}")


def read(folder: Path) -> list[dict]:
    """The runs' JSONs, in the order of their names."""
    records = [results.read(path) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise UserError(f"there are no runs in {folder}, which say on what results.csv was measured.")
    return records


# ---- what was found; `one` has one row a run, of the smallest batch size on all threads


def headline(frame: pd.DataFrame, one: pd.DataFrame) -> str:
    """The findings in short: how INT8, or what there is instead, kept its accuracy, and the largest speed-ups."""
    says = []
    for dtype in QUANTIZED:
        own = judged(one, dtype)
        if len(own):
            held, undecided, lost = ((own["verdict"] == verdict).sum() for verdict in VERDICTS)
            says = [
                f"Of {count(len(own), f'{style.DTYPES[dtype]} variant')}, {held} held the accuracy of FP32 within "
                f"{points(frame)} points, {lost} lost more and {undecided} remain undecided."
            ]
            break
    best = {column: fastest_row(timed(frame, column), column) for column in REFERENCES}
    speed = [f"{row[column]:.2f} times over {REFERENCES[column]}" for column, row in best.items() if row is not None]
    return " ".join(says + [f"Largest speed-up: {', '.join(speed)}."] * bool(speed))


def findings(frame: pd.DataFrame, one: pd.DataFrame) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Title, sentence and list (verdict, variants) of each finding; nothing is said of what was not measured."""
    found = [accuracy(one, dtype) for dtype in QUANTIZED]
    found += [fastest(frame, one, column) for column in REFERENCES] + [smallest(one)]
    return [finding for finding in found if finding]


def accuracy(one: pd.DataFrame, dtype: str):
    """Which variants of a number format held within the margin."""
    own = judged(one, dtype)
    if own.empty:
        return None
    groups = [(verdict, own[own["verdict"] == verdict]) for verdict in VERDICTS]
    counts = ", ".join(f"{len(group)} {verdict}" for verdict, group in groups)
    text = f"{count(len(own), 'variant')}, against a margin of {points(one)} points below FP32: {counts}."
    return f"{style.DTYPES[dtype]} accuracy", text, [(verdict, by_model(group)) for verdict, group in groups if len(group)]


def fastest(frame: pd.DataFrame, one: pd.DataFrame, column: str):
    """The largest speed-up of a quantized variant, and how many are faster at all at the smallest batch size."""
    best, first = fastest_row(timed(frame, column), column), timed(one, column)
    if best is None:
        return None
    text = f"At most {best[column]:.2f} times as fast (95 % interval {best[f'{column}_ci_low']:.2f} to "
    text += (
        f"{best[f'{column}_ci_high']:.2f}): {named(best)}, batch size {best['batch_size']}, {count(best['threads'], 'thread')}"
    )
    text += ", contended." if frame["contended"].eq(True)[best.name] else "."
    if len(first):
        faster, slower = (first[f"{column}_ci_low"] > 1).sum(), (first[f"{column}_ci_high"] < 1).sum()
        text += f" At batch size {joined(first['batch_size'])}, the whole interval says faster for {faster} of "
        text += f"{count(len(first), 'variant')}, slower for {slower}."
    if column == "speedup_vs_best_fp32":
        text += f" The best FP32 was {joined(timed(frame, column)['best_fp32'], ' or ')}."
    return f"Speed over {REFERENCES[column]}", text, []


def fastest_row(own: pd.DataFrame, column: str) -> pd.Series | None:
    """The row of the largest speed-up, an undisturbed one if there is any; None where nothing was timed."""
    calm = own[~own["contended"].eq(True)]
    return None if own.empty else own.loc[(own if calm.empty else calm)[column].idxmax()]


def smallest(one: pd.DataFrame):
    """The smallest deployed file among the quantized ones, beside that of its FP32 baseline."""
    files = one[one["dtype"].isin(QUANTIZED)].dropna(subset="size_mb")
    if files.empty:
        return None
    best = files.loc[files["size_mb"].idxmin()]
    others = (files["size_mb"] == best["size_mb"]).sum() - 1
    text = f"{best['size_mb']:.2f} MiB: {named(best)}"
    text += f" and {count(others, 'other')} of the same size" if others else ""
    baseline = one[(one["model"] == best["model"]) & (one["method"] == "fp32")]["size_mb"]
    if len(baseline):
        text += f"; {best['size_mb'] / baseline.iloc[0]:.2f} of its FP32 file ({baseline.iloc[0]:.2f} MiB)"
    return "Smallest file", f"{text}.", []


def notes(frame: pd.DataFrame, one: pd.DataFrame) -> list[str]:
    """What a reader must know before believing a number of this study."""
    simulated, emulated = one["simulated"].sum(), one["native_fp16"].eq(False).sum()
    disturbed, rows = frame["contended"].eq(True).sum(), frame["latency_ms_p50"].notna().sum()
    found = []
    if simulated:
        formats = joined(one[one["simulated"]]["dtype"].map(style.DTYPES))
        found.append(
            f"Simulated: {count(simulated, 'variant')} ({formats}). The arithmetic is emulated: accuracy and file count, and "
            "there is no speed. The tables mark these rows."
        )
    if emulated:
        found.append(f"Emulated: {count(emulated, 'variant')}, on a device without FP16 arithmetic. That is why they are slow.")
    if disturbed:
        found.append(f"Contended: {disturbed} of {rows} timed rows. Something else was running; do not rely on their speed.")
    return found


# ---- tables and figures


def shown(table: tables.Table) -> dict:
    """A table of `tables.py` as the template wants it: by model where it has such a column, intervals apart from their values."""
    grid = table.cells.reset_index(drop=True)
    models = grid.pop("model") if "model" in grid else pd.Series("", grid.index)
    marks = grid.get("note", pd.Series("", grid.index)).str.contains("simulated")
    groups: dict[str, list] = {}
    for model, simulated, row in zip(models, marks, grid.to_numpy(), strict=True):
        groups.setdefault(model, []).append({"simulated": simulated, "cells": [parted(cell) for cell in row]})
    heads = [(name, cells.numeric(grid[name])) for name in grid.columns]
    return {"title": table.title, "note": table.note, "heads": heads, "groups": groups}


def parted(cell: str) -> tuple[str, str]:
    """ "96.10 [95.16, 96.86]" as its value and its interval."""
    value, _, interval = cell.partition(" [")
    return (value, interval.removesuffix("]").replace(", ", " to ")) if cell.endswith("]") else (cell, "")


def everything(path: Path) -> dict:
    """results.csv, every cell as it is there, the columns of `SHOWN` first."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = {name: sorted({row[name] for row in rows}) for name in rows[0]}
    first = [name for name in SHOWN if name not in ("device", "seed") or len(values[name]) > 1]
    columns = first + [name for name in rows[0] if name not in first]
    return {
        "columns": columns,
        "shown": len(first),
        "numeric": [place for place, name in enumerate(columns, 1) if any(values[name]) and all(map(numeric, values[name]))],
        "rows": [{"simulated": row["simulated"] == "true", "cells": [row[name] for name in columns]} for row in rows],
        "filters": {name: values[name] for name in FILTERS},
    }


def figures(folder: Path, frame: pd.DataFrame) -> list[dict]:
    """The PNGs in `folder`; the caption is what the script that draws one says of itself."""
    models = joined(frame["model"].map(style.MODELS))
    found = []
    for path in sorted(folder.glob("*.png")):
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # where every PNG has them; the page does not jump while loading
        caption = described(path.stem)
        uri = "data:image/png;base64," + base64.b64encode(content).decode()
        found.append({"uri": uri, "width": width, "height": height, "caption": caption, "alt": f"Chart for {models}. {caption}"})
    return found


def described(name: str) -> str:
    """First paragraph of the docstring of the script named as the figure, or as its beginning; else the name itself."""
    scripts = [path for path in paths.FIGURES.glob("*.py") if name == path.stem or name.startswith(f"{path.stem}_")]
    if not scripts:
        return name.replace("_", " ").capitalize() + "."
    script = max(scripts, key=lambda path: len(path.stem))
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or name
    return " ".join(text.split("\n\n")[0].split())


# ---- where it was measured


def facts(frame: pd.DataFrame, one: pd.DataFrame) -> dict:
    """What the sentences on the method say of this study."""
    return {
        "images": joined(one["n_test"], " or "),
        "margin": points(one),
        "cpu": joined(one["cpu"]),
        "launches": joined(frame["n_launches"], " or ") or "no",
        "protocol": joined(frame["protocol"]) or "none",
        "tests": int(one["mcnemar_p"].notna().sum()),
        "runs": len(one),
        "rows": len(frame),
    }


def machines(records: list[dict]) -> list[dict]:
    """What the runs' environments tell of hardware and versions, each different one once, with its number of runs."""
    found: dict[tuple, int] = {}
    for record in records:
        own = record["environment"]
        versions = own.get("versions") or {"torch": own["torch"]}
        described = {
            "Processor": own["cpu"],
            "Instruction sets": ", ".join(own["isa"]),
            "CPUs": f"{own.get('cpu_count', 'unknown')}, of which used: {own.get('threads', 'unknown')}",
            "GPU": own.get("gpu") or "none",
            "System": own.get("system", "unknown"),
            "torch uses": own.get("torch_isa") or "unknown",
            "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        }
        key = tuple(described.items())
        found[key] = found.get(key, 0) + 1
    return [{**dict(key), "Runs": number} for key, number in found.items()]


def provenance(records: list[dict], source: Path) -> dict:
    """Commits, hashes, dates and commands."""
    environments = [record["environment"] for record in records]
    commits: dict[str, int] = {}
    for own in environments:
        state = {True: " with changes", False: ""}.get(own["git_dirty"], " (unknown whether changed)")
        name = f"{own['git_commit']}{state}" if own["git_commit"] else "none: not a checkout"
        commits[name] = commits.get(name, 0) + 1
    times = sorted(str(own["time_utc"]) for own in environments)
    data = records[0].get("data", {})
    return {
        "commits": commits,
        "first": times[0],
        "last": times[-1],
        "images": {part: data[part] for part in ("train", "validation", "test") if part in data},
        "data": sorted({record["provenance"]["data_sha256"] for record in records}),
        "table": hashlib.sha256(source.read_bytes()).hexdigest(),
        "commands": [
            {"run": results.run_id(record["run"]), "command": record.get("command", "unknown"), "time": own["time_utc"]}
            for record, own in zip(records, environments, strict=True)
        ],
    }


# ---- small change


def judged(one: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """The variants of a number format that have a verdict."""
    return one[(one["dtype"] == dtype) & one["verdict"].notna()]


def timed(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows of quantized networks that have a speed-up."""
    return frame[frame["dtype"].isin(QUANTIZED) & ~frame["simulated"]].dropna(subset=column)


def by_model(group: pd.DataFrame) -> str:
    """Names of variants, those of one model together."""
    parts = [
        f"{style.MODELS[model]} ({', '.join(own['variant'].str.partition(' ')[2])})"
        for model, own in group.groupby("model", observed=True)
    ]
    return ", ".join(parts)


def named(row: pd.Series) -> str:
    """A variant's name in a sentence."""
    return f"{style.MODELS[row['model']]} {row['variant']}"


def points(frame: pd.DataFrame) -> str:
    """The declared margin in points of accuracy."""
    return joined(100 * frame["margin"], " or ") or "no"


def count(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def joined(values: pd.Series, by: str = ", ") -> str:
    """The different values of a column in their order, without the missing ones."""
    return by.join(f"{value:g}" if isinstance(value, float) else str(value) for value in values.dropna().unique())


def numeric(text: str) -> bool:
    """Whether a cell of results.csv is a number, or empty."""
    try:
        return not text or float(text) is not None
    except ValueError:
        return False


if __name__ == "__main__":
    main()
