"""Report of a study on one offline page: findings, numbers, figures and provenance.

    python figures/report.py --study cats_and_dogs

Run it last: it shows the PNGs in the folder of the study's figures, next to report.html. With
--standalone, the page contains them and can be moved alone.
"""

import ast
import base64
import csv
import hashlib
import os
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
from utils import catalog, caveats, columns, paths, results
from utils.errors import UserError

# Columns that the page shows at first; `device` and `seed` only if they vary.
SHOWN = (
    "model", "method", "dtype", "backend", "device", "seed", "threads", "batch_size", "accuracy",
    "accuracy_difference", "verdict", "mcnemar_p_holm", "sqnr_db", "latency_ms_p50",
    "speedup_vs_eager_fp32", "speedup_vs_best_fp32", "size_mb", "simulated", "contended",
)  # fmt: skip
FILTERS = ("model", "method", "dtype", "backend")
# Number formats of the findings, in order of bits.
QUANTIZED = tuple(
    dict.fromkeys(dtype for method, dtype in catalog.kinds() if catalog.METHODS[method].quantizes)
)
VERDICTS = ("held", "undecided", "lost")
COMPARED_WITH = {"speedup_vs_eager_fp32": "eager FP32", "speedup_vs_best_fp32": "the best FP32"}
Finding = tuple[str, str, list[tuple[str, str]]]  # title, text, and variants by verdict


def make(frame, args):
    folder, out = args.results / args.study, script.figures_folder(args)
    records = read(folder / "runs")
    short, summary, *others = [shown(table) for table in tables.tables_of(frame, folder)]
    every, (all_seeds, _) = frame, frames.of_all_seeds(frame)
    frame = tables.named(frames.first_seed(frame))
    one, _ = frames.one_batch(frame)
    notes = caveats_of(frame, one)
    standalone = getattr(args, "standalone", False)
    page = template().render(
        study=args.study.replace("_", " "),
        headline=headline(frame, one),
        findings=findings(frame, one),
        smoke=notes.pop("smoke", None),
        notes=notes.values(),
        facts=facts(every, all_seeds),
        short=short,
        summary=summary,
        others=others,
        standalone=standalone,
        figures=figures(out, frame, standalone),
        table=everything(folder / "results.csv"),
        scatter=interactive.scatter(one),
        answers=interactive.answers(one, folder),
        help=helps(),
        links=relative(folder, out),
        machines=machines(records),
        provenance=provenance(records, folder / "results.csv"),
    )
    path = out / "report.html"
    paths.write_text(path, page + "\n")
    print(f"written: {path}")


def template() -> jinja2.Template:
    """Load the page's template; it may not use a name that `make` does not give it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def read(folder: Path) -> list[dict]:
    """Read the runs' JSONs, in the order of their names."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"there are no runs in {folder}, which say how results.csv was measured.")
    return [runs.record(path, "run", "environment", "provenance") for path in files]


# ---- findings; `one` has one row per run, at the smallest batch size on all threads


def headline(frame: pd.DataFrame, one: pd.DataFrame) -> str:
    """Findings in short: verdicts on the fewest bits, and the largest speed-ups."""
    sentences = []
    for dtype in QUANTIZED:
        variants = judged(one, dtype)
        if len(variants):
            held, undecided, lost = ((variants["verdict"] == verdict).sum() for verdict in VERDICTS)
            number = count(len(variants), f"{catalog.FORMATS[dtype].label} variant")
            sentences.append(
                f"Of {number}, {held} held the accuracy of FP32 within {points(frame)} points, "
                f"{lost} lost more and {undecided} remain undecided."
            )
            break
    speeds = []
    for column, other in COMPARED_WITH.items():
        row = fastest_row(timed(frame, column), column)
        if row is not None:
            speeds.append(f"{row[column]:.2f} times over {other}")
    if speeds:
        sentences.append(f"Largest speed-up: {', '.join(speeds)}.")
    return " ".join(sentences)


def findings(frame: pd.DataFrame, one: pd.DataFrame) -> list[Finding]:
    """Findings that were measured."""
    possible = [accuracy(one, dtype) for dtype in QUANTIZED]
    possible += [fastest(frame, one, column) for column in COMPARED_WITH]
    possible.append(smallest(one))
    return [finding for finding in possible if finding]


def accuracy(one: pd.DataFrame, dtype: str) -> Finding | None:
    """Finding: the verdicts on the variants of a number format."""
    variants = judged(one, dtype)
    if variants.empty:
        return None
    groups = {verdict: variants[variants["verdict"] == verdict] for verdict in VERDICTS}
    counts = ", ".join(f"{len(group)} {verdict}" for verdict, group in groups.items())
    text = (
        f"{count(len(variants), 'variant')}, against a margin of {points(one)} points below FP32: "
        f"{counts}."
    )
    named_groups = [(verdict, by_model(group)) for verdict, group in groups.items() if len(group)]
    return f"{catalog.FORMATS[dtype].label} accuracy", text, named_groups


def fastest(frame: pd.DataFrame, one: pd.DataFrame, column: str) -> Finding | None:
    """Finding: the largest speed-up of a quantized variant, and the number of faster ones.

    The number is for the smallest batch size.
    """
    best, first = fastest_row(timed(frame, column), column), timed(one, column)
    if best is None:
        return None
    low, high = best[f"{column}_ci_low"], best[f"{column}_ci_high"]
    text = (
        f"At most {best[column]:.2f} times as fast (95 % interval {low:.2f} to {high:.2f}): "
        f"{named(best)}, batch size {best['batch_size']}, {count(best['threads'], 'thread')}"
    )
    text += ", contended." if frame["contended"].eq(True)[best.name] else "."
    if len(first):
        faster = (first[f"{column}_ci_low"] > 1).sum()
        slower = (first[f"{column}_ci_high"] < 1).sum()
        text += (
            f" At batch size {joined(first['batch_size'])}, the whole interval lies above 1 "
            f"(faster) for {faster} of {count(len(first), 'variant')}, below 1 (slower) for "
            f"{slower}."
        )
    if column == "speedup_vs_best_fp32":
        text += f" The best FP32 was {joined(timed(frame, column)['best_fp32'], ' or ')}."
    return f"Speed over {COMPARED_WITH[column]}", text, []


def fastest_row(rows: pd.DataFrame, column: str) -> pd.Series | None:
    """Row of the largest speed-up, an undisturbed one if possible; None if nothing was timed."""
    if rows.empty:
        return None
    calm = rows[~rows["contended"].eq(True)]
    return rows.loc[(rows if calm.empty else calm)[column].idxmax()]


def smallest(one: pd.DataFrame) -> Finding | None:
    """Finding: the smallest file of a quantized variant, next to its FP32 baseline's file."""
    files = one[one["dtype"].isin(QUANTIZED)].dropna(subset="size_mb")
    if files.empty:
        return None
    best = files.loc[files["size_mb"].idxmin()]
    text = f"{best['size_mb']:.2f} MiB: {named(best)}"
    others = (files["size_mb"] == best["size_mb"]).sum() - 1
    if others:
        text += f" and {count(others, 'other')} of the same size"
    baselines = one[(one["model"] == best["model"]) & (one["method"] == "fp32")]["size_mb"]
    if len(baselines):
        fp32 = baselines.iloc[0]
        text += f"; {best['size_mb'] / fp32:.2f} of its FP32 file ({fp32:.2f} MiB)"
    return "Smallest file", f"{text}.", []


def caveats_of(frame: pd.DataFrame, one: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Explain each caveat of a study, and count the rows or runs with it."""
    rows, of_runs = tally(frame), tally(one)
    numbers = {}
    for caveat in caveats.MEANING:
        if rows[caveat]:
            numbers[caveat] = f"{rows[caveat]} of {count(len(frame), 'row')}"
        elif of_runs[caveat]:
            numbers[caveat] = f"{of_runs[caveat]} of {count(len(one), 'run')}"
    margin = None if frame["margin"].isna().all() else frame["margin"].max()
    meanings = caveats.explained(numbers, margin)
    pairs = zip(meanings, numbers.values(), strict=True)
    return dict(zip(numbers, pairs, strict=True))


def tally(frame: pd.DataFrame) -> Counter[str]:
    """Count the rows with each caveat."""
    return Counter(caveat for row in cells.caveats_of(frame) for caveat in row)


# ---- tables and figures


def shown(table: tables.Table) -> dict:
    """Prepare a table for the template: grouped by model, with intervals split off."""
    grid = table.cells.reset_index(drop=True)
    models = grid.pop("model") if "model" in grid else pd.Series("", grid.index)
    marks = grid.get("note", pd.Series("", grid.index)).str.contains("simulated")
    groups: dict[str, list] = {}
    for model, simulated, row in zip(models, marks, grid.to_numpy(), strict=True):
        content = {"simulated": simulated, "cells": [parted(cell) for cell in row]}
        groups.setdefault(model, []).append(content)
    heads = [(name, cells.numeric(grid[name])) for name in grid.columns]
    return {"title": table.title, "note": table.note, "heads": heads, "groups": groups}


def parted(cell: str) -> tuple[str, str]:
    """Split a cell such as "96.10 [95.16, 96.86]" into its value and its interval."""
    if not cell.endswith("]"):
        return cell, ""
    value, _, interval = cell.partition(" [")
    return value, interval.removesuffix("]").replace(", ", " to ")


def everything(path: Path) -> dict:
    """Read results.csv with literal cells, the columns of `SHOWN` first."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = {name: sorted({row[name] for row in rows}) for name in rows[0]}
    first = [name for name in SHOWN if name not in ("device", "seed") or len(values[name]) > 1]
    names = first + [name for name in rows[0] if name not in first]
    right = []
    for place, name in enumerate(names, 1):
        if any(values[name]) and all(map(numeric, values[name])):
            right.append(place)
    lines = []
    for row in rows:
        cells = [row[name] for name in names]
        lines.append({"simulated": row["simulated"] == "true", "cells": cells})
    return {
        "columns": names,
        "shown": len(first),
        "numeric": right,
        "rows": lines,
        "filters": {name: values[name] for name in FILTERS},
    }


def helps() -> dict[str, str]:
    """Meaning and unit of each column of results.csv, as plain text."""
    texts = {}
    for column in columns.COLUMNS:
        unit = f" ({column.unit})" if column.unit else ""
        texts[column.name] = column.meaning.replace("`", "") + unit
    return texts


def relative(folder: Path, page: Path) -> str:
    """Path from the folder of the page to the folder of the results, for links."""
    return quote(Path(os.path.relpath(folder, page)).as_posix())


def figures(folder: Path, frame: pd.DataFrame, standalone: bool) -> list[dict]:
    """List the PNGs in `folder`, with captions from the docstrings of their scripts.

    The source of a picture is its content if the page is `standalone`, otherwise its name. A
    comparison with the dissertation is left out if the study has another data set.
    """
    models = joined(tables.model_labels(frame))
    pictures = []
    for path in sorted(folder.glob("*.png")):
        if path.stem == published.FIGURE and not frames.is_dissertations(frame):
            continue
        content = path.read_bytes()
        # The header of every PNG has its size; with it, the page does not jump while loading.
        width, height = struct.unpack(">II", content[16:24])
        source = quote(path.name)
        if standalone:
            source = "data:image/png;base64," + base64.b64encode(content).decode()
        caption = described(path.stem)
        alt = f"Chart for {models}. {caption}"
        pictures.append(
            {"source": source, "width": width, "height": height, "caption": caption, "alt": alt}
        )
    return pictures


def described(name: str) -> str:
    """Caption: first paragraph of the docstring of the figure's script; otherwise the name."""
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
    """Hardware and versions, each combination once, with its number of runs."""
    numbers: Counter[tuple] = Counter()
    for record in records:
        environment = record["environment"]
        versions = environment.get("versions") or {"torch": environment["torch"]}
        cpus, threads = (environment.get(name, "unknown") for name in ("cpu_count", "threads"))
        machine = {
            "Processor": environment["cpu"],
            "Instruction sets": ", ".join(environment["isa"]),
            "CPUs": f"{cpus}, of which used: {threads}",
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
    times = sorted(str(environment["time_utc"]) for environment in environments)
    data = records[0].get("data", {})
    return {
        "commits": Counter(commit(environment) for environment in environments),
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


def commit(environment: dict) -> str:
    """Describe the code of a run by its commit."""
    if not environment["git_commit"]:
        return "none: not a checkout"
    states = {True: " with changes", False: ""}
    state = states.get(environment["git_dirty"], " (unknown whether changed)")
    return f"{environment['git_commit']}{state}"


# ---- words and selections


def judged(one: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """Select the variants of a number format that have a verdict."""
    return one[(one["dtype"] == dtype) & one["verdict"].notna()]


def timed(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Select the rows of quantized networks that have a speed-up."""
    return frame[frame["dtype"].isin(QUANTIZED) & ~frame["simulated"]].dropna(subset=column)


def by_model(group: pd.DataFrame) -> str:
    """Name variants, grouped by model."""
    parts = []
    for model, rows in group.groupby("model", observed=True):
        variants = ", ".join(rows["variant"].str.partition(" ")[2])
        parts.append(f"{catalog.MODELS[model].label} ({variants})")
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
    known = values.dropna().unique()
    return by.join(f"{value:g}" if isinstance(value, float) else str(value) for value in known)


def numeric(text: str) -> bool:
    """Whether a cell of results.csv is a number, or empty."""
    try:
        return not text or float(text) is not None
    except ValueError:
        return False


if __name__ == "__main__":
    script.run(make, __doc__, script.standalone_option)
