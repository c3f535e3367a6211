"""Cells of a table: numbers as strings, empty where there is no number. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import re

import pandas as pd

from utils import caveats

RATIO, POINTS, MS = "{:.3f}", "{:+.2f}", "{:.2f}"


def number(value: float, form: str = "{:.2f}") -> str:
    """Format a number, one that rounds to zero without a minus; nothing where there is none."""
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
    low, high = (
        text(scale * frame[f"{bounds or column}_ci_{end}"], form) for end in ("low", "high")
    )
    both = text(scale * frame[column], form) + " [" + low + ", " + high + "]"
    return both.where(frame[column].notna(), "")


def p_value(column: pd.Series) -> pd.Series:
    """Format p-values, small ones as "<0.001"."""
    return text(column, "{:.3f}").where(column.isna() | (column >= 0.001), "<0.001")


def latency(frame: pd.DataFrame, name: str) -> dict[str, pd.Series]:
    """Format the latency, under `name`, and the speed-ups over both FP32 references."""
    return {
        name: with_interval(frame, "latency_ms_p50", MS, bounds="latency_ms"),
        "x eager FP32": with_interval(frame, "speedup_vs_eager_fp32", RATIO),
        "x best FP32": with_interval(frame, "speedup_vs_best_fp32", RATIO),
        "best FP32": frame["best_fp32"].astype(object).fillna(""),
    }


def notes(frame: pd.DataFrame) -> pd.Series:
    """Caveats of each row, in the words that `caveats.MEANING` explains."""
    return pd.Series(["; ".join(words) for words in caveats_of(frame)], frame.index, dtype=str)


def caveats_of(frame: pd.DataFrame) -> list[list[str]]:
    """List the caveats of each row."""
    return [caveats.of(plain(row)) for row in frame.to_dict("records")]


def plain(row: dict) -> dict:
    """Replace what pandas puts into empty cells by None."""
    return {name: None if pd.isna(value) else value for name, value in row.items()}


def numeric(column: pd.Series) -> bool:
    """Whether a column of strings begins with numbers, and so is aligned to the right."""
    filled = column[column != ""]
    return len(filled) > 0 and bool(filled.str.match(r"[-+<]?\d").all())


ACTIVE = re.compile(r"([|]|<(?=[a-zA-Z/!]))")  # what would end a cell or begin HTML


def markdown(table: pd.DataFrame) -> str:
    """Format a frame of strings as a Markdown table whose columns line up as plain text too."""
    columns = []
    for name in table.columns:
        texts = [ACTIVE.sub(r"\\\1", cell) for cell in (name, *table[name])]
        right, width = numeric(table[name]), max(2, *map(len, texts))
        rule = "-" * (width - 1) + (":" if right else "-")
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell in texts]
        columns.append([cells[0], rule, *cells[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
