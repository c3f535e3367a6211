"""Distribution of latency over its median, at the smallest batch size on all threads.

python figures/latency_distributions.py --study cats_and_dogs
"""

import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from utils.errors import UserError

MARKS = style.Dots("latency_ms_p50")
HALO = [style.withStroke(linewidth=2, foreground="white")]  # also visible on black
PERCENTILES = {"latency_ms_p50": "-", "latency_ms_p90": "--", "latency_ms_p99": ":"}


def samples(row, args):
    """Read the times in ms of all timed runs of a row, from every launch and round."""
    path = runs.path(args, row)
    for timing in runs.record(path, "timing")["timing"]:
        if (timing["threads"], timing["batch_size"]) == (row["threads"], row["batch_size"]):
            rounds = chain.from_iterable(timing["samples_ms"])
            return np.array(list(chain.from_iterable(rounds)))
    raise UserError(f"{path} lacks times that results.csv gives; run its script again.")


def violin(axes, place, times, row):
    """Draw one distribution."""
    shape = dict(orientation="horizontal", widths=0.8, points=200, showextrema=False)
    (body,) = axes.violinplot(times, [place], **shape)["bodies"]
    colour = style.colour(row)
    if style.filled(row):
        body.set(facecolor=colour, edgecolor="black", alpha=1, lw=0.6)
    else:
        body.set(facecolor="white", edgecolor=colour, alpha=1, lw=1.3)


def end(row, times):
    """Place where the axis may end: the p99, or the longest run if there are too few for a p99."""
    if pd.isna(row["latency_ms_p99"]):
        return times.max()
    return row["latency_ms_p99"] / row["latency_ms_p50"]


def digits(value):
    """Format a number with three digits: 1.83, 18.3, 183; a dash if it is missing."""
    if pd.isna(value):
        return "–"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(value))))}f}"


def draw(axes, place, row, times):
    """Draw a distribution with lines at its percentiles, and the percentiles in ms."""
    violin(axes, place, times, row)
    for column, dashes in PERCENTILES.items():
        x = row[column] / row["latency_ms_p50"]
        line = dict(color="black", lw=1, ls=dashes, path_effects=HALO)
        axes.plot([x, x], [place - 0.4, place + 0.4], **line)
    text = " / ".join(digits(row[column]) for column in PERCENTILES)
    right = dict(transform=axes.get_yaxis_transform(), va="center")
    axes.text(1.02, place, text, fontsize=5.5, **right)


def make(frame, args):
    frame, batch = frames.one_batch(frame)
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows, width=2.6)
    for axes, _, part in panels:
        style.gaps(axes, part, rows, MARKS)
        timed = [row for _, row in part.dropna(subset="latency_ms_p50").iterrows()]
        times = [samples(row, args) / row["latency_ms_p50"] for row in timed]
        ends = [end(row, relative) - 1 for row, relative in zip(timed, times, strict=True)]
        right = 1 + 1.1 * max([0.1, *ends])
        for row, relative in zip(timed, times, strict=True):
            draw(axes, rows.index(row["series"]), row, relative[relative <= right])
        axes.set_xlim(right=right)
        axes.set_xlabel("Latency / its median")
    text = (
        f"Distribution of latency at batch {batch} (hollow: {style.methods(filled=False)}; "
        "cut off just beyond p99)\n"
        "Lines: p50 (solid), p90 (dashed), p99 (dotted); numbers to the right: the same in ms"
    )
    if frame.dropna(subset="latency_ms_p50")[[*PERCENTILES]].isna().any(axis=None):
        text += " (–: too few runs)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "latency_distributions")


if __name__ == "__main__":
    script.run(make, __doc__)
