"""Confusion matrix of every variant: images by true and by predicted class.

python figures/confusion_matrices.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style

LONGEST = 11  # characters of a class name that fit next to a cell


def matrix(row):
    """Count images: rows are true classes, columns predicted ones, the negative class first."""
    return np.array([[row["tn"], row["fp"]], [row["fn"], row["tp"]]], dtype=int)


def shortened(name):
    """Shorten a class name in the middle, so names with a common beginning stay different."""
    return style.literal(name if len(name) <= LONGEST else f"{name[:5]}…{name[-5:]}")


def make(frame, args):
    names = [shortened(name) for name in frames.classes(frame)]
    figure, panels = style.grid(frames.one_batch(frame)[0], cell=0.85)
    for axes, row in panels:
        counts = matrix(row)
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        style.shaded(axes, shares, cmap="Blues", vmin=0, vmax=1.25)
        axes.set_aspect("equal")
        for (y, x), count in np.ndenumerate(counts):
            colour = "white" if shares[y, x] > 0.6 else "black"
            axes.text(x, y, count, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks([0, 1], names, fontsize=5.5)
        axes.set_yticks([0, 1], names, fontsize=5.5, rotation=90, va="center")
        axes.tick_params(length=0, pad=1)
    text = (
        "Confusion matrices: rows are true classes, columns predicted classes "
        "(shade: share of the row)"
    )
    figure.suptitle(style.title(frame, text), fontsize=8)
    style.save(figure, args, "confusion_matrices")


if __name__ == "__main__":
    script.run(make, __doc__)
