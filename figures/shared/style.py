"""How figures look: colour = number format, marker = model, filled or hollow = method.

The colours differ in lightness (see utils/catalog.py), so a figure printed in grey keeps its
meaning; the darker three are told apart with any kind of colour vision. Every marker has a black
edge. No torch.
"""

if __name__ == "__main__":
    import no_script  # noqa: F401

import argparse
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.lines import Line2D
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from figures.shared import frames, script
from utils import catalog, paths

OUTLINE = [
    Stroke(linewidth=2.2, foreground="0.25"),
    withStroke(linewidth=0),
]  # light lines stay visible in grey
BESIDE = dict(
    fontsize=6.5, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=4, title_fontsize=7
)  # of a legend
OFFSETS = [
    (x, y) for far in (9, 16, 23, 30) for y in (far, -far) for x in (0, -16, 16, -32, 32)
]  # of texts, in points
METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}  # same data, same bytes

sns.set_theme(
    context="paper",
    style="whitegrid",
    rc={"axes.edgecolor": "0.3", "pdf.fonttype": 42, "savefig.dpi": 200},
)
plt.rcParams["pdf.compression"] = (
    0  # by the zlib of the system, of which there are several: the bytes would depend on it
)


@dataclass(frozen=True)
class Dots:
    """Marks of a dot plot: one for each run, in the row that `by` names."""

    column: str  # their values
    interval: str = ""  # bars from column INTERVAL_low to INTERVAL_high
    scale: float = 1  # of values and bars
    by: str = "series"  # column with the name of the row
    shift: float = 0  # rows that they lie below the middle of theirs
    look: dict = field(default_factory=dict)  # changes to `look`


# ---- what stands for what


def colour(row: pd.Series) -> str:
    """Colour of a run: that of its number format."""
    return catalog.FORMATS[row["dtype"]].colour


def filled(row: pd.Series) -> bool:
    """Whether the marks of a run are filled: that depends on its method."""
    return catalog.METHODS[row["method"]].filled


def methods(filled: bool) -> str:
    """Labels of the quantizing methods whose marks are filled, or of those whose marks are not."""
    return ", ".join(
        method.label
        for method in catalog.METHODS.values()
        if method.quantizes and method.filled == filled
    )


def look(row: pd.Series) -> dict:
    """Marker of a run; a hollow one is a ring of its colour between black lines."""
    marker = catalog.MODELS[row["model"]].marker
    if filled(row):
        return dict(marker=marker, color=colour(row), markeredgecolor="black", ms=7)
    ring = [withStroke(linewidth=2.4, foreground="black")]
    return dict(
        marker=marker, color="white", markeredgecolor=colour(row), mew=1.3, ms=6, path_effects=ring
    )


def legend(frame: pd.DataFrame, *more: Line2D) -> list[Line2D]:
    """Legend entries for colours, filled and hollow marks, and what stands in `more`."""
    handles = [Line2D([], [], ls="", marker="D", mfc=dtype.colour, mec="black", label=dtype.label)
               for name, dtype in catalog.FORMATS.items() if name in set(frame["dtype"])]  # fmt: skip
    fills = {
        f"filled: {methods(filled=True)}, FP32": "0.7",
        f"hollow: {methods(filled=False)}": "white",
    }
    handles += [
        Line2D([], [], ls="", marker="D", mfc=fill, mec="black", label=text)
        for text, fill in fills.items()
    ]
    return [*handles, *more]


# ---- dot plots


def panels(
    frame: pd.DataFrame, rows: list[str], width: float = 1.9
) -> tuple[plt.Figure, list[tuple[plt.Axes, str, pd.DataFrame]]]:
    """Make an empty dot plot for each model; return it with the model's part of the frame."""
    models = frames.present(frame)
    size = (2.2 + width * len(models), 1.3 + 0.27 * max(4, len(rows)))
    figure, grid = plt.subplots(
        1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
        axes.set(yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
    grid[0][0].set_yticklabels(rows)
    return figure, [
        (axes, model, frame[frame["model"] == model])
        for axes, model in zip(grid[0], models, strict=True)
    ]


def dots(axes: plt.Axes, runs: pd.DataFrame, rows: list[str], marks: Dots) -> None:
    """Draw a model's runs into a dot plot; seeds of one row lie side by side.

    A star says that something else was running while a time was taken.
    """
    timing = marks.column in frames.TIMING
    if timing:
        axes.margins(x=0.1)  # room for a star
    for place, name in enumerate(rows):
        drawn = runs[runs[marks.by] == name].dropna(subset=marks.column)
        for n, (_, row) in enumerate(drawn.iterrows()):
            x, y = (
                marks.scale * row[marks.column],
                place + marks.shift + 0.12 * (n - (len(drawn) - 1) / 2),
            )
            low, high = (
                marks.scale * row[f"{marks.interval}_{end}"] if marks.interval else x
                for end in ("low", "high")
            )
            if marks.interval:
                axes.errorbar(
                    x, y, xerr=[[max(0, x - low)], [max(0, high - x)]], ecolor="0.4", capsize=2
                )
            axes.plot(x, y, ls="", zorder=3, **look(row) | marks.look)
            if timing and pd.notna(row["contended"]) and row["contended"]:
                axes.annotate(
                    "*", (max(x, high), y), (4, -3), textcoords="offset points", fontsize=9
                )


def gaps(
    axes: plt.Axes, runs: pd.DataFrame, rows: list[str], marks: Dots, prefix: str = ""
) -> None:
    """Write "not run" in rows that a model lacks, and "not timed" where its runs lack a value."""
    size = 5.5 if marks.shift else 7
    for place, name in enumerate(rows):
        same = runs[runs[marks.by] == name]
        if name and same[marks.column].isna().all():
            text, at = "not run" if same.empty else "not timed", axes.get_yaxis_transform()
            axes.text(0.5, place + marks.shift, f"{prefix}{text}", transform=at, ha="center", va="center", color="0.4",
                fontsize=size)  # fmt: skip


def baseline(axes: plt.Axes, runs: pd.DataFrame, marks: Dots) -> None:
    """Draw a dotted line through the panel at the value of the model's FP32 network."""
    for value in runs[runs["method"] == "fp32"][marks.column]:
        axes.axvline(marks.scale * value, color="black", lw=0.8, ls=":", zorder=1)


def sizes(figure: plt.Figure, names: dict[int, str]) -> None:
    """Add a legend below a figure for marks of different sizes: size in points -> what it means."""
    grey = dict(ls="", marker="o", mfc="0.8", mec="black")
    handles = [Line2D([], [], ms=size, label=name, **grey) for size, name in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)


def contended(frame: pd.DataFrame) -> str:
    """Explain the stars of `dots` for a title, if there are any."""
    return "; *: something else was running" if frame["contended"].eq(True).any() else ""


# ---- texts, axes and small panels


def annotate(axes: plt.Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Write a text beside each point (x, y, text), clear of points and other texts, as long as there is room.

    Points that come first get theirs first; a text without room is left out.
    The layout must be done: positions are those of the finished figure.
    """
    points = list(points)
    at = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_extents(*(xy - 6), *(xy + 6)) for xy in at]
    line = dict(arrowstyle="-", lw=0.4, color="0.5", shrinkA=0, shrinkB=3)
    for x, y, text in points:
        for offset in OFFSETS:
            label = axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=6, ha="center", va="center",
                                  arrowprops=line, zorder=4)  # fmt: skip
            label.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(label).padded(1)
            inside = (
                axes.bbox.containsx(box.x0)
                and axes.bbox.containsx(box.x1)
                and axes.bbox.containsy(box.y0)
            )
            if inside and axes.bbox.containsy(box.y1) and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def log_scale(axis: Axis) -> None:
    """Make an axis logarithmic, with as many plain numbers as it is long enough for."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    box = axis.axes.get_window_extent()
    inches = (box.width if axis.axis_name == "x" else box.height) / axis.axes.figure.dpi
    dense = math.log10(high / low) / inches  # decades an inch
    steps = (
        (1, 1.5, 2, 3, 5, 7)
        if dense < 0.5
        else (1, 2, 5)
        if dense < 1.1
        else (1, 3)
        if dense < 1.6
        else (1,)
    )
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def grid(
    frame: pd.DataFrame, cell: float, columns: int = 8
) -> tuple[plt.Figure, list[tuple[plt.Axes, pd.Series]]]:
    """Make a block of small square panels for each model, one a series; return those of runs.

    The others say "not run".
    """
    rows, models = frames.labels(frame), frames.present(frame)
    columns = min(columns, len(rows))
    deep = -(-len(rows) // columns)
    size = (0.7 + cell * columns, 0.7 + (cell + 0.27) * deep * len(models))
    figure, squares = plt.subplots(
        deep * len(models), columns, figsize=size, squeeze=False, layout="constrained"
    )
    used = []
    for n, model in enumerate(models):
        runs = frame[frame["model"] == model].set_index("series", drop=False)
        block = squares[n * deep : (n + 1) * deep].ravel()
        block[0].set_ylabel(catalog.MODELS[model].label, fontsize=7.5)
        for axes, name in zip(block, rows, strict=False):
            axes.set(xticks=[], yticks=[], box_aspect=1)
            axes.set_title(name.replace(" simulated", "\nsimulated"), fontsize=5.5, pad=2)
            if name in runs.index:
                used.append((axes, runs.loc[name]))
            else:
                axes.text(
                    0.5,
                    0.5,
                    "not run",
                    transform=axes.transAxes,
                    ha="center",
                    va="center",
                    color="0.4",
                    fontsize=6,
                )
        for axes in block[len(rows) :]:
            axes.set_axis_off()
    return figure, used


# ---- the whole figure


def shaded(axes: plt.Axes, table: np.ndarray, **shades) -> QuadMesh:
    """Draw a table of numbers (rows, columns) as shaded cells, the first row on top, whose centres are 0, 1, ...

    They are areas: as a picture, which a PDF holds in print resolution, 80 tables of 2 x 2 cells took 5.6 MB.
    """
    cells = axes.pcolormesh(table, shading="nearest", edgecolors="face", linewidth=0.1, **shades)
    axes.invert_yaxis()
    axes.grid(False)
    return cells


def literal(text: str) -> str:
    """Return `text` so that Matplotlib draws it as it is: what stands between two $ would be set as mathematics."""
    return text.replace("$", r"\$")


def title(frame: pd.DataFrame, text: str) -> str:
    """Add to a title on which images and which processors the rows were measured."""
    return f"{text}\n{textwrap.fill(frames.setting(frame), 110)}"


def save(figure: plt.Figure, args: argparse.Namespace, name: str) -> None:
    """Write NAME.png and NAME.pdf, the same bytes for the same data, and say where."""
    for kind, metadata in METADATA.items():
        path = script.figures_folder(args) / f"{name}.{kind}"
        with paths.atomic(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata, bbox_inches="tight")
        print(f"written: {path}")
    plt.close(figure)
