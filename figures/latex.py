"""A table as LaTeX: the rules of booktabs, and a longtable, which breaks over pages. No torch."""

import re
import textwrap

import pandas as pd
from cells import numeric

SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"}
SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}  # TeX's first fonts have others in their places
LONG = 32  # characters of a cell beyond which its column is a paragraph, broken into lines
PORTRAIT = 100  # characters of a row that fit on an upright page


def table(frame: pd.DataFrame, title: str, note: str, label: str) -> str:
    """A frame of strings as a file for \\input; a wide one is printed small on a page that is turned."""
    widths = {name: max(map(len, (*name.split(), *frame[name]))) for name in frame}
    wide = sum(min(width, LONG) + 2 for width in widths.values()) > PORTRAIT
    size, begin, end = (r"\tiny", "begin{landscape}", "end{landscape}") if wide else (r"\footnotesize", "begingroup", "endgroup")
    names = " & ".join(stacked(name, width, "r" if numeric(frame[name]) else "l") for name, width in widths.items())
    between = "\n\\addlinespace\n" if max(widths.values()) > LONG else "\n"
    head = rf"\toprule {names} \\ \midrule"
    lines = [
        r"% needs \usepackage{array, booktabs, longtable, pdflscape}",
        rf"\{begin}{size}\setlength{{\tabcolsep}}{{2pt}}",
        rf"\begin{{longtable}}{{@{{}}{''.join(kind(frame[name], width) for name, width in widths.items())}@{{}}}}",
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
    """How LaTeX is to set a column."""
    if width > LONG:
        return r">{\raggedright\arraybackslash}p{45mm}"
    return "r" if numeric(column) else "l"


def row(cells) -> str:
    return " & ".join(escape(cell) for cell in cells) + r" \\"


def stacked(name: str, width: int, side: str) -> str:
    """A column's name in as many lines as keep it from being wider than what is below it."""
    lines = r"\\".join(escape(line) for line in textwrap.wrap(name, width))
    return rf"\shortstack[{side}]{{{lines}}}"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; the sign of a negative number becomes a minus."""
    escaped = "".join(SPECIAL.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)
