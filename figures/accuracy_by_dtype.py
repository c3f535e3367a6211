"""Test accuracy of every deployed network with its 95 % interval, next to its FP32 baseline.

python figures/accuracy_by_dtype.py --study cats_and_dogs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style

MARKS = style.Dots("accuracy", "accuracy_ci", scale=100)


def make(frame, args):
    frame, _ = frames.one_batch(frame)
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, _, runs in panels:
        style.gaps(axes, runs, rows, MARKS)
        style.dots(axes, runs, rows, MARKS)
        style.baseline(axes, runs, MARKS)
        axes.set_xlabel("Test accuracy (%)")
    text = "Accuracy by number format (95 % Wilson intervals; dotted: FP32)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "accuracy_by_dtype")


if __name__ == "__main__":
    script.run(make, __doc__)
