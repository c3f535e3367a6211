"""Data for the interactive parts of the report: a scatter plot and all answers. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from figures.shared import frames, runs, style
from figures.shared.cells import number
from utils import catalog, results

WIDTH, HEIGHT = 760, 420  # of the scatter's view box
LEFT, BOTTOM, EDGE = 62, 50, 14  # margins, in units of the view box
LEAST_ROOM = 0.08  # decades between a point and the edge
TICKS = [mantissa * 10**power for power in range(-3, 4) for mantissa in (1, 2, 5)]  # of the ratio
LINE_STEPS = (0.5, 1, 2, 5, 10, 20)  # points of accuracy between two horizontal lines
MOST_LINES = 6
MARKER_PATHS = {  # markers of the catalog, as SVG paths around (0, 0)
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    "s": "M-4.5-4.5h9v9h-9Z",
    "^": "M0-5.6L5.6 4.6H-5.6Z",
    "D": "M0-6L6 0L0 6L-6 0Z",
}


@dataclass(frozen=True)
class Axes:
    """Ranges of the scatter plot, and the places of values in its view box."""

    low: float  # decades of time over the fastest FP32
    high: float
    bottom: float  # percent of accuracy
    top: float
    step: float  # between two horizontal lines

    def x(self, time: float) -> float:
        """Place of a time over the fastest FP32."""
        share = (math.log10(time) - self.low) / (self.high - self.low)
        return round(LEFT + share * (WIDTH - LEFT - EDGE), 1)

    def y(self, accuracy: float) -> float:
        """Place of an accuracy in percent."""
        share = (self.top - accuracy) / (self.top - self.bottom)
        return round(EDGE + share * (HEIGHT - BOTTOM - EDGE), 1)


def scatter(one: pd.DataFrame) -> dict | None:
    """Points, axes and legend of accuracy against time over the fastest FP32's time.

    `one` has one row per run. Places are in a view box of WIDTH x HEIGHT. None if nothing was
    timed.
    """
    timed = one.dropna(subset="speedup_vs_best_fp32")
    if timed.empty:
        return None
    times, accuracies = 1 / timed["speedup_vs_best_fp32"], 100 * timed["accuracy"]
    axes = axes_for(times, accuracies)
    points = []
    for (_, row), time, accuracy in zip(timed.iterrows(), times, accuracies, strict=True):
        place = {"x": axes.x(time), "y": axes.y(accuracy), "label": label(row)}
        points.append(place | look(row))
    lines = np.arange(axes.bottom, axes.top + axes.step / 2, axes.step)
    formats = [entry for name, entry in catalog.FORMATS.items() if name in set(timed["dtype"])]
    ticks = [tick for tick in TICKS if axes.low <= math.log10(tick) <= axes.high]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - EDGE,
        "top": EDGE,
        "bottom": HEIGHT - BOTTOM,
        "points": points,
        "vertical": [(axes.x(tick), f"{tick:g}") for tick in ticks],
        "horizontal": [(axes.y(value), f"{value:g}") for value in lines if value <= 100],
        "one": axes.x(1),
        "shapes": [(catalog.MODELS[name].label, shape(name)) for name in frames.present(timed)],
        "colours": [(entry.label, entry.colour) for entry in formats],
        "hollow": style.methods(filled=False),
    }


def axes_for(times: pd.Series, accuracies: pd.Series) -> Axes:
    """Choose axes that hold all points and the fastest FP32, at time 1."""
    spread = accuracies.max() - accuracies.min()
    step = next((step for step in LINE_STEPS if spread / step <= MOST_LINES), LINE_STEPS[-1])
    return Axes(
        low=math.log10(min(times.min(), 1)) - LEAST_ROOM,
        high=math.log10(max(times.max(), 1)) + LEAST_ROOM,
        bottom=max(0, step * math.floor(accuracies.min() / step - 0.5)),
        top=min(100, step * math.ceil(accuracies.max() / step + 0.5)),
        step=step,
    )


def shape(model: str) -> str:
    """SVG path of a model's marker; a circle if MARKER_PATHS lacks it."""
    return MARKER_PATHS.get(catalog.MODELS[model].marker, MARKER_PATHS["o"])


def look(row: pd.Series) -> dict:
    """Shape, colour and filling of a point, as in the figures."""
    return {
        "shape": shape(row["model"]),
        "colour": style.colour(row),
        "hollow": not style.filled(row),
    }


def label(row: pd.Series) -> str:
    """Describe a point in words."""
    low, high = (number(100 * row[f"accuracy_ci_{end}"]) for end in ("low", "high"))
    parts = [
        f"{catalog.MODELS[row['model']].label} {row['variant']}: "
        f"{number(100 * row['accuracy'])} % [{low}, {high}]",
        f"{number(row['speedup_vs_best_fp32'])} times as fast as the fastest FP32 "
        f"({row['best_fp32']})",
        f"{number(row['size_mb'])} MiB",
    ]
    if pd.notna(row["verdict"]):
        parts.append(row["verdict"])
    return ", ".join(parts)


def answers(one: pd.DataFrame, folder: Path) -> dict:
    """Decisions of all runs, to compare any two of them.

    `folder` is the study's. `runs` has a name and one digit per test image, the class that the run
    decided for; `labels` has the correct classes. `names` has the names of the images, or is empty
    if they are unknown. Runs on another set of images than the first one are left out.
    """
    decided, labels = [], None
    for _, row in one.iterrows():
        logits, y = runs.answers(folder / "runs" / f"{row['run']}.npz")
        labels = y if labels is None else labels
        if np.array_equal(labels, y):
            name = f"{catalog.MODELS[row['model']].label} {row['variant']}"
            decided.append({"name": name, "answers": digits(logits.argmax(1))})
    names = results.test_images(folder)
    return {
        "classes": [one["negative_class"].iloc[0], one["positive_class"].iloc[0]],
        "labels": digits(labels),
        "names": names if len(names) == len(labels) else [],
        "runs": decided,
    }


def digits(classes: np.ndarray) -> str:
    """Write classes, (n,) of 0 and 1, as n characters."""
    return "".join(map(str, classes.tolist()))
