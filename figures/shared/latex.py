"""Tables as LaTeX: booktabs rules in a longtable, which breaks across pages. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import re
import textwrap

import pandas as pd

from figures.shared.cells import numeric

SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"}
SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
# TeX's default font encoding has other characters in these places.
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
LONG = 32  # a column with longer cells, in characters, becomes a paragraph that breaks into lines
PORTRAIT = 100  # characters of a row that fit on a portrait page


def table(frame: pd.DataFrame, title: str, note: str, label: str) -> str:
    """Format a frame of strings for \\input; a wide table is small and on a landscape page."""
    widths = {name: max(map(len, (*name.split(), *frame[name]))) for name in frame}
    size, begin, end = r"\footnotesize", "begingroup", "endgroup"
    if sum(min(width, LONG) + 2 for width in widths.values()) > PORTRAIT:
        size, begin, end = r"\tiny", "begin{landscape}", "end{landscape}"
    kinds = "".join(kind(frame[name], width) for name, width in widths.items())
    sides = {name: "r" if numeric(frame[name]) else "l" for name in frame}
    names = " & ".join(stacked(name, width, sides[name]) for name, width in widths.items())
    between = "\n\\addlinespace\n" if max(widths.values()) > LONG else "\n"
    head = rf"\toprule {names} \\ \midrule"
    lines = [
        r"% needs \usepackage{array, booktabs, longtable, pdflscape}",
        rf"\{begin}{size}\setlength{{\tabcolsep}}{{2pt}}",
        rf"\begin{{longtable}}{{@{{}}{kinds}@{{}}}}",
        rf"\caption[{escape(title)}]{{{escape(title)}. {escape(note)}}} \label{{{label}}} \\",
        rf"{head} \endfirsthead",
        rf"{head} \endhead",
        r"\bottomrule \endfoot",
        between.join(row(cells) for cells in frame.to_numpy()),
        r"\end{longtable}",
        rf"\{end}",
    ]
    return "\n".join(lines) + "\n"


def kind(column: pd.Series, width: int) -> str:
    """Column specification: a paragraph for long texts, right for numbers, otherwise left."""
    if width > LONG:
        return r">{\raggedright\arraybackslash}p{45mm}"
    return "r" if numeric(column) else "l"


def row(cells) -> str:
    """Format one row."""
    return " & ".join(escape(cell) for cell in cells) + r" \\"


def stacked(name: str, width: int, side: str) -> str:
    """Break a column's name into lines that are not wider than its cells."""
    lines = r"\\".join(escape(line) for line in textwrap.wrap(name, width))
    return rf"\shortstack[{side}]{{{lines}}}"


def escape(text: str) -> str:
    """Escape a text for LaTeX; the sign of a negative number becomes a minus."""
    escaped = "".join(SPECIAL.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)
