"""What the report page draws itself: the points of its scatter, and the answers of all runs, image by image. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import math
from pathlib import Path

import numpy as np
import pandas as pd

from figures.shared import frames, runs, style
from figures.shared.cells import number
from utils import catalog, results

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 760, 420, 62, 50, 14  # of the scatter, in units of its view box
TICKS = [
    mantissa * 10**power for power in range(-3, 4) for mantissa in (1, 2, 5)
]  # of the ratio of times
STEPS = (0.5, 1, 2, 5, 10, 20)  # points of accuracy between two lines
SHAPES = {  # markers of the catalog, as SVG paths around (0, 0)
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z", "s": "M-4.5-4.5h9v9h-9Z", "^": "M0-5.6L5.6 4.6H-5.6Z", "D": "M0-6L6 0L0 6L-6 0Z",
}  # fmt: skip


def scatter(one: pd.DataFrame) -> dict | None:
    """Points, axes and legend of accuracy against time over that of the fastest FP32 of the machine.

    `one` has one row for each run. Places are those in a view box of WIDTH x HEIGHT. None if no run
    was timed.
    """
    timed = one.dropna(subset="speedup_vs_best_fp32")
    if timed.empty:
        return None
    times, accuracies = 1 / timed["speedup_vs_best_fp32"], 100 * timed["accuracy"]
    low, high = math.log10(min(times.min(), 1)) - 0.08, math.log10(max(times.max(), 1)) + 0.08
    step = next(
        (step for step in STEPS if (accuracies.max() - accuracies.min()) / step <= 6), STEPS[-1]
    )
    bottom = max(0, step * math.floor(accuracies.min() / step - 0.5))
    top = min(100, step * math.ceil(accuracies.max() / step + 0.5))

    def x(time: float) -> float:
        return round(LEFT + (math.log10(time) - low) / (high - low) * (WIDTH - LEFT - EDGE), 1)

    def y(accuracy: float) -> float:
        return round(EDGE + (top - accuracy) / (top - bottom) * (HEIGHT - BOTTOM - EDGE), 1)

    points = [
        {"x": x(time), "y": y(accuracy), "label": label(row), **look(row)}
        for (_, row), time, accuracy in zip(timed.iterrows(), times, accuracies, strict=True)
    ]
    lines = np.arange(bottom, top + step / 2, step)
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - EDGE, "top": EDGE, "bottom": HEIGHT - BOTTOM,
        "points": points,
        "vertical": [(x(tick), f"{tick:g}") for tick in TICKS if low <= math.log10(tick) <= high],
        "horizontal": [(y(value), f"{value:g}") for value in lines if value <= 100],
        "one": x(1),
        "shapes": [(catalog.MODELS[name].label, shape(name)) for name in frames.present(timed)],
        "colours": [(each.label, each.colour) for name, each in catalog.FORMATS.items() if name in set(timed["dtype"])],
        "hollow": style.methods(filled=False),
    }  # fmt: skip


def shape(model: str) -> str:
    """SVG path of a model's marker; a circle where SHAPES lacks it."""
    return SHAPES.get(catalog.MODELS[model].marker, SHAPES["o"])


def look(row: pd.Series) -> dict:
    """Shape, colour and filling of a point, as in the figures."""
    return {
        "shape": shape(row["model"]),
        "colour": style.colour(row),
        "hollow": not style.filled(row),
    }


def label(row: pd.Series) -> str:
    """Say what a point stands for."""
    low, high = (number(100 * row[f"accuracy_ci_{end}"]) for end in ("low", "high"))
    says = [
        f"{catalog.MODELS[row['model']].label} {row['variant']}: {number(100 * row['accuracy'])} % [{low}, {high}]",
        f"{number(row['speedup_vs_best_fp32'])} times as fast as the fastest FP32 ({row['best_fp32']})",
        f"{number(row['size_mb'])} MiB",
    ]
    return ", ".join(says + ([row["verdict"]] if pd.notna(row["verdict"]) else []))


def answers(one: pd.DataFrame, folder: Path) -> dict:
    """The decisions of all runs, for a comparison of any two.

    `folder` is the study's. `runs` has a name and a digit for each test image, the class that was
    decided for; `labels` has the right ones. `names` are those of the images, or empty if unknown.
    Runs on another number of images than the first are left out.
    """
    decided, labels = [], None
    for _, row in one.iterrows():
        logits, y = runs.answers(folder / "runs" / f"{row['run']}.npz")
        labels = y if labels is None else labels
        if np.array_equal(labels, y):
            decided.append(
                {
                    "name": f"{catalog.MODELS[row['model']].label} {row['variant']}",
                    "answers": digits(logits.argmax(1)),
                }
            )
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
