"""Look of the figures: colour = number format, marker = model, filled or hollow = method.

The colours differ in lightness (see utils/catalog.py), so a figure printed in grey keeps its
meaning. The three darker ones can be told apart with any kind of colour vision. Every marker has a
black edge. No torch.
"""

if __name__ == "__main__":
    import no_script  # noqa: F401

import argparse
import math
import os
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

# Notebooks export a backend that other environments lack, and matplotlib's import would fail on it.
os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.lines import Line2D
from matplotlib.patches import Patch  # noqa: F401  (figures import it from here)
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from figures.shared import frames, script
from utils import catalog, paths

# Keeps light lines visible in grey.
OUTLINE = [Stroke(linewidth=2.2, foreground="0.25"), withStroke(linewidth=0)]
LEGEND_BESIDE = dict(
    fontsize=6.5, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=4, title_fontsize=7
)
LEGEND_BELOW = dict(loc="outside lower center", frameon=False)
# Places of a text around its point, in points of print; near ones come first.
OFFSETS = [(x, y) for far in (9, 16, 23, 30) for y in (far, -far) for x in (0, -16, 16, -32, 32)]
# The same data give the same bytes.
METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}

sns.set_theme(
    context="paper",
    style="whitegrid",
    rc={"axes.edgecolor": "0.3", "pdf.fonttype": 42, "savefig.dpi": 200},
)
# Compressed bytes would depend on the system's zlib, of which there are several.
plt.rcParams["pdf.compression"] = 0


@dataclass(frozen=True)
class Dots:
    """Marks of a dot plot: one per run, in the row that `by` names."""

    column: str  # their values
    interval: str = ""  # bars from column INTERVAL_low to INTERVAL_high
    scale: float = 1  # of values and bars
    by: str = "series"  # column with the name of the row
    shift: float = 0  # distance below the middle of the row, in rows
    look: dict = field(default_factory=dict)  # changes to the function `look`


# ---- colours, markers and legends


def colour(row: pd.Series) -> str:
    """Colour of a run, which shows its number format."""
    return catalog.FORMATS[row["dtype"]].colour


def filled(row: pd.Series) -> bool:
    """Whether the marks of a run are filled, which shows its method."""
    return catalog.METHODS[row["method"]].filled


def methods(filled: bool) -> str:
    """Labels of the quantizing methods with filled or with hollow marks."""
    quantizing = [method for method in catalog.METHODS.values() if method.quantizes]
    return ", ".join(method.label for method in quantizing if method.filled == filled)


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
    """Legend entries for colours, filled and hollow marks, and `more`."""
    formats = [dtype for name, dtype in catalog.FORMATS.items() if name in set(frame["dtype"])]
    fills = {dtype.label: dtype.colour for dtype in formats}
    fills[f"filled: {methods(filled=True)}, FP32"] = "0.7"
    fills[f"hollow: {methods(filled=False)}"] = "white"
    diamond = dict(ls="", marker="D", mec="black")
    handles = [Line2D([], [], mfc=fill, label=text, **diamond) for text, fill in fills.items()]
    return [*handles, *more]


# ---- dot plots


def panels(
    frame: pd.DataFrame, rows: list[str], width: float = 1.9
) -> tuple[plt.Figure, list[tuple[plt.Axes, str, pd.DataFrame]]]:
    """Make an empty dot plot per model; return each with the model's part of the frame."""
    models = frames.present(frame)
    size = (2.2 + width * len(models), 1.3 + 0.27 * max(4, len(rows)))
    figure, grid = plt.subplots(
        1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    parts = []
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
        axes.set(yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        parts.append((axes, model, frame[frame["model"] == model]))
    grid[0][0].set_yticklabels(rows)
    return figure, parts


def dots(axes: plt.Axes, runs: pd.DataFrame, rows: list[str], marks: Dots) -> None:
    """Draw a model's runs into a dot plot, with the seeds of one row side by side.

    A star marks a time that was taken while something else was running.
    """
    timing = marks.column in frames.TIMING
    if timing:
        axes.margins(x=0.1)  # room for a star
    for place, name in enumerate(rows):
        drawn = runs[runs[marks.by] == name].dropna(subset=marks.column)
        for n, (_, row) in enumerate(drawn.iterrows()):
            x = marks.scale * row[marks.column]
            y = place + marks.shift + 0.12 * (n - (len(drawn) - 1) / 2)
            high = x
            if marks.interval:
                low = marks.scale * row[f"{marks.interval}_low"]
                high = marks.scale * row[f"{marks.interval}_high"]
                ends = [[max(0, x - low)], [max(0, high - x)]]
                axes.errorbar(x, y, xerr=ends, ecolor="0.4", capsize=2)
            axes.plot(x, y, ls="", zorder=3, **look(row) | marks.look)
            if timing and pd.notna(row["contended"]) and row["contended"]:
                star = (max(x, high), y)
                axes.annotate("*", star, (4, -3), textcoords="offset points", fontsize=9)


def gaps(
    axes: plt.Axes, runs: pd.DataFrame, rows: list[str], marks: Dots, form: str = "{}"
) -> None:
    """Write "not run" or "not timed", in `form`, in a model's rows without runs or values."""
    look = dict(ha="center", va="center", color="0.4", fontsize=5.5 if marks.shift else 7)
    for place, name in enumerate(rows):
        same = runs[runs[marks.by] == name]
        if name and same[marks.column].isna().all():
            text = form.format("not run" if same.empty else "not timed")
            middle = dict(transform=axes.get_yaxis_transform())
            axes.text(0.5, place + marks.shift, text, **middle, **look)


def baseline(axes: plt.Axes, runs: pd.DataFrame, marks: Dots) -> None:
    """Draw a dotted line through the panel at the value of the model's FP32 network."""
    for value in runs[runs["method"] == "fp32"][marks.column]:
        axes.axvline(marks.scale * value, color="black", lw=0.8, ls=":", zorder=1)


def sizes(figure: plt.Figure, names: dict[int, str]) -> None:
    """Add a legend below a figure for marks of several sizes: size in points -> meaning."""
    grey = dict(ls="", marker="o", mfc="0.8", mec="black")
    handles = [Line2D([], [], ms=size, label=name, **grey) for size, name in names.items()]
    figure.legend(handles=handles, ncols=2, fontsize=7.5, **LEGEND_BELOW)


def contended(frame: pd.DataFrame) -> str:
    """Explain the stars of `dots` for a title, if there are any."""
    return "; *: something else was running" if frame["contended"].eq(True).any() else ""


def converted(frame: pd.DataFrame) -> str:
    """Say that some speed-ups over the fastest FP32 were timed against another engine."""
    any_converted = frame["best_fp32_converted"].eq(True).any()
    return "; over the fastest FP32 partly converted, see tables.md" if any_converted else ""


def missing(axes: plt.Axes, names: list[str], runs: pd.DataFrame, place: dict) -> None:
    """Write into a panel the series in `names` that a model's runs lack."""
    absent = [name for name in names if name not in set(runs["series"])]
    text = "not run: " + ", ".join(absent) if absent else ""
    axes.text(s=text, transform=axes.transAxes, ha="right", fontsize=6, color="0.4", **place)


# ---- texts, axes and small panels


def annotate(axes: plt.Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Write texts next to points (x, y, text), clear of all points and of each other.

    Earlier points get their text first; a text without room is left out. The layout must be done,
    because positions are positions in the finished figure.
    """
    points = list(points)
    at = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_extents(*(xy - 6), *(xy + 6)) for xy in at]
    line = dict(arrowstyle="-", lw=0.4, color="0.5", shrinkA=0, shrinkB=3)
    look = dict(textcoords="offset points", fontsize=6, ha="center", va="center", zorder=4)
    for x, y, text in points:
        for offset in OFFSETS:
            label = axes.annotate(text, (x, y), offset, arrowprops=line, **look)
            label.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(label).padded(1)
            if inside(axes.bbox, box) and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def inside(outer: Bbox, inner: Bbox) -> bool:
    """Whether one box lies within another one."""
    across = outer.containsx(inner.x0) and outer.containsx(inner.x1)
    return across and outer.containsy(inner.y0) and outer.containsy(inner.y1)


def log_scale(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers as densely as its length allows."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    box = axis.axes.get_window_extent()
    inches = (box.width if axis.axis_name == "x" else box.height) / axis.axes.figure.dpi
    axis.set_major_locator(LogLocator(subs=ticks(math.log10(high / low) / inches)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def ticks(decades_per_inch: float) -> tuple[float, ...]:
    """Choose the numbers to show in each decade of a logarithmic axis."""
    if decades_per_inch < 0.5:
        return (1, 1.5, 2, 3, 5, 7)
    if decades_per_inch < 1.1:
        return (1, 2, 5)
    return (1, 3) if decades_per_inch < 1.6 else (1,)


def grid(
    frame: pd.DataFrame, cell: float, columns: int = 8
) -> tuple[plt.Figure, list[tuple[plt.Axes, pd.Series]]]:
    """Make a block of small square panels per model, one per series; return the used ones.

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
                not_run(axes, va="center", fontsize=6)
        for axes in block[len(rows) :]:
            axes.set_axis_off()
    return figure, used


def not_run(axes: plt.Axes, **look) -> None:
    """Write "not run" into the middle of an empty panel."""
    axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color="0.4", **look)


# ---- the whole figure


def shaded(axes: plt.Axes, table: np.ndarray, **shades) -> QuadMesh:
    """Draw a table of numbers as shaded cells with centres 0, 1, ... and the first row on top.

    The cells are areas. As pictures, which a PDF holds in print resolution, 80 tables of 2 x 2
    cells took 5.6 MB.
    """
    cells = axes.pcolormesh(table, shading="nearest", edgecolors="face", linewidth=0.1, **shades)
    axes.invert_yaxis()
    axes.grid(False)
    return cells


def literal(text: str) -> str:
    """Escape `text` for Matplotlib, which would set text between two $ as mathematics."""
    return text.replace("$", r"\$")


def title(frame: pd.DataFrame, text: str) -> str:
    """Add the images and processors of the measurements to a title."""
    return f"{text}\n{textwrap.fill(frames.setting(frame), 110)}"


def save(figure: plt.Figure, args: argparse.Namespace, name: str) -> None:
    """Write NAME.png and NAME.pdf, with the same bytes for the same data, and print the paths."""
    for kind, metadata in METADATA.items():
        path = script.figures_folder(args) / f"{name}.{kind}"
        with paths.atomic(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata, bbox_inches="tight")
        print(f"written: {path}")
    plt.close(figure)
