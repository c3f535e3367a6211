"""The report: findings, numbers, figures and provenance of a study in one offline page.

python figures/report.py --study cats_and_dogs

Run it last: it shows the PNGs that are in the folder of the study's figures.
"""

import ast
import base64
import csv
import hashlib
import os
import re
import struct
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import jinja2
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures import tables
from figures.shared import cells, frames, interactive, published, runs, script
from utils import catalog, caveats, paths, results
from utils.errors import UserError

# Columns that the page shows at first; of `device` and `seed` only what varies.
SHOWN = (
    "model", "method", "dtype", "backend", "device", "seed", "threads", "batch_size", "accuracy", "accuracy_difference",
    "verdict", "mcnemar_p_holm", "sqnr_db", "latency_ms_p50", "speedup_vs_eager_fp32", "speedup_vs_best_fp32", "size_mb",
    "simulated", "contended",
)  # fmt: skip
FILTERS = ("model", "method", "dtype", "backend")
# Number formats of the findings, by ascending bits.
QUANTIZED = tuple(
    dict.fromkeys(dtype for method, dtype in catalog.kinds() if catalog.METHODS[method].quantizes)
)
VERDICTS = ("held", "undecided", "lost")
REFERENCES = {"speedup_vs_eager_fp32": "eager FP32", "speedup_vs_best_fp32": "the best FP32"}


def make(frame, args):
    folder = args.results / args.study
    records = read(folder / "runs")
    short, summary, *others = [shown(table) for table in tables.tables_of(frame, folder)]
    every, (all_seeds, _) = frame, frames.of_all_seeds(frame)
    frame = tables.named(frames.first_seed(frame))
    one, _ = frames.one_batch(frame)
    notes = caveats_of(frame, one)
    # strict: a name that only the template knows is a mistake, not an empty place
    options = dict(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), **options
    )
    page = environment.get_template("report.html.j2").render(
        study=args.study.replace("_", " "),
        headline=headline(frame, one),
        findings=findings(frame, one),
        smoke=notes.pop("smoke", None),
        notes=notes.values(),
        facts=facts(every, all_seeds),
        short=short,
        summary=summary,
        others=others,
        figures=figures(script.figures_folder(args), frame),
        table=everything(folder / "results.csv"),
        scatter=interactive.scatter(one),
        answers=interactive.answers(one, folder),
        help=helps(),
        links=relative(folder, script.figures_folder(args)),
        machines=machines(records),
        provenance=provenance(records, folder / "results.csv"),
    )
    path = script.figures_folder(args) / "report.html"
    paths.write_text(path, page + "\n")
    print(f"written: {path}")


def read(folder: Path) -> list[dict]:
    """Read the runs' JSONs, in the order of their names."""
    records = [
        runs.record(path, "run", "environment", "provenance")
        for path in sorted(folder.glob("*.json"))
    ]
    if not records:
        raise UserError(
            f"there are no runs in {folder}, which say on what results.csv was measured."
        )
    return records


# ---- findings; `one` has one row for each run, of the smallest batch size on all threads


def headline(frame: pd.DataFrame, one: pd.DataFrame) -> str:
    """Findings in short: how the fewest bits kept the accuracy, and the largest speed-ups."""
    says = []
    for dtype in QUANTIZED:
        variants = judged(one, dtype)
        if len(variants):
            held, undecided, lost = ((variants["verdict"] == verdict).sum() for verdict in VERDICTS)
            says = [
                f"Of {count(len(variants), f'{catalog.FORMATS[dtype].label} variant')}, {held} held the accuracy of FP32 within "
                f"{points(frame)} points, {lost} lost more and {undecided} remain undecided."
            ]
            break
    best = {column: fastest_row(timed(frame, column), column) for column in REFERENCES}
    speed = [
        f"{row[column]:.2f} times over {REFERENCES[column]}"
        for column, row in best.items()
        if row is not None
    ]
    return " ".join(says + [f"Largest speed-up: {', '.join(speed)}."] * bool(speed))


def findings(
    frame: pd.DataFrame, one: pd.DataFrame
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Title, text and list of (verdict, variants) of each finding that was measured."""
    all_findings = [accuracy(one, dtype) for dtype in QUANTIZED]
    all_findings += [fastest(frame, one, column) for column in REFERENCES] + [smallest(one)]
    return [finding for finding in all_findings if finding]


def accuracy(one: pd.DataFrame, dtype: str):
    """Finding: which variants of a number format held within the margin."""
    variants = judged(one, dtype)
    if variants.empty:
        return None
    groups = [(verdict, variants[variants["verdict"] == verdict]) for verdict in VERDICTS]
    counts = ", ".join(f"{len(group)} {verdict}" for verdict, group in groups)
    text = f"{count(len(variants), 'variant')}, against a margin of {points(one)} points below FP32: {counts}."
    return (
        f"{catalog.FORMATS[dtype].label} accuracy",
        text,
        [(verdict, by_model(group)) for verdict, group in groups if len(group)],
    )


def fastest(frame: pd.DataFrame, one: pd.DataFrame, column: str):
    """Finding: the largest speed-up of a quantized variant, and how many are faster at all.

    The count is of the smallest batch size.
    """
    best, first = fastest_row(timed(frame, column), column), timed(one, column)
    if best is None:
        return None
    low, high = (best[f"{column}_ci_{end}"] for end in ("low", "high"))
    text = f"At most {best[column]:.2f} times as fast (95 % interval {low:.2f} to {high:.2f}): {named(best)}, "
    text += f"batch size {best['batch_size']}, {count(best['threads'], 'thread')}"
    text += ", contended." if frame["contended"].eq(True)[best.name] else "."
    if len(first):
        faster, slower = (
            (first[f"{column}_ci_low"] > 1).sum(),
            (first[f"{column}_ci_high"] < 1).sum(),
        )
        text += f" At batch size {joined(first['batch_size'])}, the whole interval lies above 1 (faster) for {faster} of "
        text += f"{count(len(first), 'variant')}, below 1 (slower) for {slower}."
    if column == "speedup_vs_best_fp32":
        text += f" The best FP32 was {joined(timed(frame, column)['best_fp32'], ' or ')}."
    return f"Speed over {REFERENCES[column]}", text, []


def fastest_row(rows: pd.DataFrame, column: str) -> pd.Series | None:
    """Row of the largest speed-up, undisturbed if any is; None where nothing was timed."""
    calm = rows[~rows["contended"].eq(True)]
    return None if rows.empty else rows.loc[(rows if calm.empty else calm)[column].idxmax()]


def smallest(one: pd.DataFrame):
    """Finding: the smallest file of a quantized variant, beside that of its FP32 baseline."""
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


def caveats_of(frame: pd.DataFrame, one: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Explanation of each caveat of a study, and how many rows or runs it concerns."""
    rows, by_run = (
        Counter(words for row in cells.caveats_of(part) for words in row) for part in (frame, one)
    )
    margin = None if frame["margin"].isna().all() else frame["margin"].max()
    said = [words for words in caveats.MEANING if rows[words] or by_run[words]]
    numbers = [
        f"{rows[words]} of {count(len(frame), 'row')}"
        if rows[words]
        else f"{by_run[words]} of {count(len(one), 'run')}"
        for words in said
    ]
    return dict(zip(said, zip(caveats.explained(said, margin), numbers, strict=True), strict=True))


# ---- tables and figures


def shown(table: tables.Table) -> dict:
    """Prepare a table for the template: grouped by model, intervals apart from values."""
    grid = table.cells.reset_index(drop=True)
    models = grid.pop("model") if "model" in grid else pd.Series("", grid.index)
    marks = grid.get("note", pd.Series("", grid.index)).str.contains("simulated")
    groups: dict[str, list] = {}
    for model, simulated, row in zip(models, marks, grid.to_numpy(), strict=True):
        groups.setdefault(model, []).append(
            {"simulated": simulated, "cells": [parted(cell) for cell in row]}
        )
    heads = [(name, cells.numeric(grid[name])) for name in grid.columns]
    return {"title": table.title, "note": table.note, "heads": heads, "groups": groups}


def parted(cell: str) -> tuple[str, str]:
    """Split a cell such as "96.10 [95.16, 96.86]" into its value and its interval."""
    value, _, interval = cell.partition(" [")
    return (
        (value, interval.removesuffix("]").replace(", ", " to "))
        if cell.endswith("]")
        else (cell, "")
    )


def everything(path: Path) -> dict:
    """Read results.csv, every cell as it is there, the columns of `SHOWN` first."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = {name: sorted({row[name] for row in rows}) for name in rows[0]}
    first = [name for name in SHOWN if name not in ("device", "seed") or len(values[name]) > 1]
    columns = first + [name for name in rows[0] if name not in first]
    return {
        "columns": columns,
        "shown": len(first),
        "numeric": [
            place
            for place, name in enumerate(columns, 1)
            if any(values[name]) and all(map(numeric, values[name]))
        ],
        "rows": [
            {"simulated": row["simulated"] == "true", "cells": [row[name] for name in columns]}
            for row in rows
        ],
        "filters": {name: values[name] for name in FILTERS},
    }


def helps() -> dict[str, str]:
    """What each column of results.csv is, from results/README.md; nothing where that has been removed."""
    source = paths.RESULTS / "README.md"
    text = source.read_text(encoding="utf-8").partition("## Columns")[2] if source.exists() else ""
    rows = re.findall(r"^\| (`[^|]*`) \|([^|]*)\| (.*) \|$", text, re.MULTILINE)
    return {
        name: f"{meaning.replace('`', '')}{unit.strip() and f' ({unit.strip()})'}"
        for names, unit, meaning in rows
        for name in _whole(re.findall(r"`(\w+)`", names))
    }


def _whole(names: list[str]) -> list[str]:
    """Complete names of which only the end is written: `a_ci_low` and `_ci_high` give `a_ci_high`."""
    return [
        names[0].removesuffix("_ci_low") + name if name.startswith("_") else name for name in names
    ]


def relative(folder: Path, page: Path) -> str:
    """The way from the folder of the page to that of the results, for links."""
    return quote(Path(os.path.relpath(folder, page)).as_posix())


def figures(folder: Path, frame: pd.DataFrame) -> list[dict]:
    """Read the PNGs in `folder` and take captions from the docstrings of their scripts.

    A comparison with the dissertation is left out where it is of another data set.
    """
    models = joined(tables.model_labels(frame))
    pictures = []
    for path in sorted(folder.glob("*.png")):
        if path.stem == published.FIGURE and not frames.is_dissertations(frame):
            continue
        content = path.read_bytes()
        width, height = struct.unpack(
            ">II", content[16:24]
        )  # where every PNG has them; the page does not jump while loading
        caption = described(path.stem)
        uri = "data:image/png;base64," + base64.b64encode(content).decode()
        alt = f"Chart for {models}. {caption}"
        pictures.append(
            {"uri": uri, "width": width, "height": height, "caption": caption, "alt": alt}
        )
    return pictures


def described(name: str) -> str:
    """Caption: first paragraph of the docstring of the figure's script; without one, the name."""
    scripts = [
        path
        for path in paths.FIGURES.glob("*.py")
        if name == path.stem or name.startswith(f"{path.stem}_")
    ]
    if not scripts:
        return name.replace("_", " ").capitalize() + "."
    script = max(scripts, key=lambda path: len(path.stem))
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or name
    return " ".join(text.split("\n\n")[0].split())


# ---- method, hardware and provenance


def facts(frame: pd.DataFrame, one: pd.DataFrame) -> dict:
    """Numbers and names of this study for the texts of the page."""
    return {
        "images": joined(one["n_test"], " or "),
        "margin": points(one),
        "cpu": frames.processors(frame),
        "launches": joined(frame["n_launches"], " or ") or "no",
        "protocol": joined(frame["protocol"]) or "none",
        "tests": int(one["mcnemar_p"].notna().sum()),
        "runs": len(one),
        "rows": len(frame),
    }


def machines(records: list[dict]) -> list[dict]:
    """Hardware and versions, each different combination once, with its number of runs."""
    numbers: Counter[tuple] = Counter()
    for record in records:
        environment = record["environment"]
        versions = environment.get("versions") or {"torch": environment["torch"]}
        machine = {
            "Processor": environment["cpu"],
            "Instruction sets": ", ".join(environment["isa"]),
            "CPUs": f"{environment.get('cpu_count', 'unknown')}, of which used: {environment.get('threads', 'unknown')}",
            "GPU": environment.get("gpu") or "none",
            "System": environment.get("system", "unknown"),
            "torch uses": environment.get("torch_isa") or "unknown",
            "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        }
        numbers[tuple(machine.items())] += 1
    return [{**dict(machine), "Runs": number} for machine, number in numbers.items()]


def provenance(records: list[dict], source: Path) -> dict:
    """Commits, hashes, dates and commands."""
    environments = [record["environment"] for record in records]
    commits: Counter[str] = Counter()
    for environment in environments:
        state = {True: " with changes", False: ""}.get(
            environment["git_dirty"], " (unknown whether changed)"
        )
        commits[
            f"{environment['git_commit']}{state}"
            if environment["git_commit"]
            else "none: not a checkout"
        ] += 1
    times = sorted(str(environment["time_utc"]) for environment in environments)
    data = records[0].get("data", {})
    return {
        "commits": commits,
        "first": times[0],
        "last": times[-1],
        "images": {part: data[part] for part in ("train", "validation", "test") if part in data},
        "data": sorted({record["provenance"]["data_sha256"] for record in records}),
        "table": hashlib.sha256(source.read_bytes()).hexdigest(),
        "commands": [
            {
                "run": results.run_id(record["run"]),
                "command": record.get("command", "unknown"),
                "time": record["environment"]["time_utc"],
                "seconds": record["environment"].get("script_s", ""),
            }
            for record in records
        ],
    }


# ---- words and selections


def judged(one: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """Select the variants of a number format that have a verdict."""
    return one[(one["dtype"] == dtype) & one["verdict"].notna()]


def timed(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Select the rows of quantized networks that have a speed-up."""
    return frame[frame["dtype"].isin(QUANTIZED) & ~frame["simulated"]].dropna(subset=column)


def by_model(group: pd.DataFrame) -> str:
    """Name variants, those of one model together."""
    parts = [
        f"{catalog.MODELS[model].label} ({', '.join(rows['variant'].str.partition(' ')[2])})"
        for model, rows in group.groupby("model", observed=True)
    ]
    return ", ".join(parts)


def named(row: pd.Series) -> str:
    """Name a variant in a sentence."""
    return f"{catalog.MODELS[row['model']].label} {row['variant']}"


def points(frame: pd.DataFrame) -> str:
    """Format the declared margin in points of accuracy."""
    return joined(100 * frame["margin"], " or ") or "no"


def count(number: int, noun: str) -> str:
    """Format a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def joined(values: pd.Series, by: str = ", ") -> str:
    """Join the different values of a column in their order, without missing ones."""
    return by.join(
        f"{value:g}" if isinstance(value, float) else str(value)
        for value in values.dropna().unique()
    )


def numeric(text: str) -> bool:
    """Whether a cell of results.csv is a number, or empty."""
    try:
        return not text or float(text) is not None
    except ValueError:
        return False


if __name__ == "__main__":
    script.run(make, __doc__)
