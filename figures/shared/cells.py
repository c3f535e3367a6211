"""Cells of a table: numbers as strings, empty if there is no number. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import re

import pandas as pd

from utils import caveats

RATIO, POINTS, MS = "{:.3f}", "{:+.2f}", "{:.2f}"
ACTIVE = re.compile(r"([|]|<(?=[a-zA-Z/!]))")  # would end a cell or begin HTML


def number(value: float, form: str = "{:.2f}") -> str:
    """Format a number; empty if it is missing, without a minus if it rounds to zero."""
    if pd.isna(value):
        return ""
    text = form.format(value)
    return text if re.search("[1-9]", text) else form.format(0)


def text(column: pd.Series, form: str = "{:.2f}") -> pd.Series:
    """Format every number of a column."""
    return pd.Series([number(value, form) for value in column], column.index, dtype=str)


def percent(column: pd.Series) -> pd.Series:
    """Format shares as percentages."""
    return text(100 * column)


def with_interval(
    frame: pd.DataFrame, column: str, form: str, scale: float = 1, bounds: str = ""
) -> pd.Series:
    """Format `column` with its interval in `bounds`_ci_low and _high: "96.10 [95.16, 96.86]"."""
    name = bounds or column
    low = text(scale * frame[f"{name}_ci_low"], form)
    high = text(scale * frame[f"{name}_ci_high"], form)
    value = text(scale * frame[column], form)
    cells = (value + " [" + low + ", " + high + "]").where(low != "", value)
    return cells.where(frame[column].notna(), "")


def p_value(column: pd.Series) -> pd.Series:
    """Format p-values, small ones as "<0.001"."""
    return text(column, "{:.3f}").where(column.isna() | (column >= 0.001), "<0.001")


def latency(frame: pd.DataFrame, name: str) -> dict[str, pd.Series]:
    """Format the latency, under `name`, and the speed-ups over three kinds of FP32."""
    return {
        name: with_interval(frame, "latency_ms_p50", MS, bounds="latency_ms"),
        "x eager FP32": with_interval(frame, "speedup_vs_eager_fp32", RATIO),
        "x same engine": with_interval(frame, "speedup_vs_same_engine_fp32", RATIO),
        "x best FP32": with_interval(frame, "speedup_vs_best_fp32", RATIO),
        "best FP32": frame["best_fp32"].astype(object).fillna(""),
    }


def notes(frame: pd.DataFrame) -> pd.Series:
    """Caveats of each row, as keys of `caveats.MEANING` joined by semicolons."""
    return pd.Series(["; ".join(row) for row in caveats_of(frame)], frame.index, dtype=str)


def caveats_of(frame: pd.DataFrame) -> list[list[str]]:
    """List the caveats of each row."""
    return [caveats.of(plain(row)) for row in frame.to_dict("records")]


def plain(row: dict) -> dict:
    """Replace the missing values of pandas by None."""
    return {name: None if pd.isna(value) else value for name, value in row.items()}


def numeric(column: pd.Series) -> bool:
    """Whether the strings of a column begin with numbers, so that it is aligned to the right."""
    filled = column[column != ""]
    return len(filled) > 0 and bool(filled.str.match(r"[-+<]?\d").all())


def markdown(table: pd.DataFrame) -> str:
    """Format a frame of strings as a Markdown table that also lines up as plain text."""
    columns = []
    for name in table.columns:
        texts = [ACTIVE.sub(r"\\\1", cell) for cell in (name, *table[name])]
        width = max(2, *map(len, texts))
        if numeric(table[name]):
            cells = [cell.rjust(width) for cell in texts]
            rule = "-" * (width - 1) + ":"
        else:
            cells = [cell.ljust(width) for cell in texts]
            rule = "-" * width
        columns.append([cells[0], rule, *cells[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
