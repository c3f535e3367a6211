"""Cells of a table: columns of numbers as columns of strings, empty where there is no number. No torch."""

import pandas as pd

RATIO, POINTS, MS = "{:.3f}", "{:+.2f}", "{:.2f}"


def number(value: float, form: str = "{:.2f}") -> str:
    """A number by a format; nothing where there is none."""
    return "" if pd.isna(value) else form.format(value)


def text(column: pd.Series, form: str = "{:.2f}") -> pd.Series:
    return pd.Series([number(value, form) for value in column], column.index, dtype=str)


def percent(column: pd.Series) -> pd.Series:
    return text(100 * column)


def with_interval(frame: pd.DataFrame, column: str, form: str, scale: float = 1, bounds: str = "") -> pd.Series:
    """`column` with the interval beside it, which is in `bounds`_ci_low and _ci_high: "96.10 [95.16, 96.86]"."""
    low, high = (text(scale * frame[f"{bounds or column}_ci_{end}"], form) for end in ("low", "high"))
    found = text(scale * frame[column], form) + " [" + low + ", " + high + "]"
    return found.where(frame[column].notna(), "")


def p_value(column: pd.Series) -> pd.Series:
    """p-values, small ones not as 0.000."""
    return text(column, "{:.3f}").where(column.isna() | (column >= 0.001), "<0.001")


def latency(frame: pd.DataFrame, name: str) -> dict[str, pd.Series]:
    """Latency, under `name`, and the speed-ups over both FP32 references."""
    return {
        name: with_interval(frame, "latency_ms_p50", MS, bounds="latency_ms"),
        "x eager FP32": with_interval(frame, "speedup_vs_eager_fp32", RATIO),
        "x best FP32": with_interval(frame, "speedup_vs_best_fp32", RATIO),
        "best FP32": frame["best_fp32"].astype(object).fillna(""),
    }


def notes(frame: pd.DataFrame) -> pd.Series:
    """What makes a row's speed another thing than that of the others."""
    marks = pd.DataFrame({
        "simulated": frame["simulated"],
        "timed otherwise": ~frame["simulated"] & frame["latency_ms_p50"].isna(),
        "contended": frame["contended"].eq(True),
        "FP16 emulated": frame["native_fp16"].eq(False),
        "qnnpack off ARM": frame["backend"].eq("qnnpack") & frame["isa"].astype(str).str.contains("avx2"),
    })  # fmt: skip
    return pd.Series(["; ".join(marks.columns[own]) for own in marks.to_numpy(bool)], frame.index, dtype=str)


def numeric(column: pd.Series) -> bool:
    """Whether a column of strings holds numbers, perhaps with more behind them, and so belongs to the right."""
    filled = column[column != ""]
    return len(filled) > 0 and bool(filled.str.match(r"[-+<]?\d").all())


def markdown(table: pd.DataFrame) -> str:
    """A frame of strings as a Markdown table whose columns line up as plain text too."""
    columns = []
    for name in table.columns:
        right, width = numeric(table[name]), max(2, len(name), *table[name].str.len())
        rule = "-" * (width - 1) + (":" if right else "-")
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell in (name, *table[name])]
        columns.append([cells[0], rule, *cells[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
