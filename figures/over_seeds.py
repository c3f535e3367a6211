"""Accuracy of variants that were trained with several seeds: every seed and their mean.

python figures/over_seeds.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, seeds, style
from utils.errors import UserError

SINGLE = style.Dots("accuracy", scale=100, shift=-0.2, look=dict(ms=4))
MEAN = style.Dots("accuracy", "accuracy_ci", scale=100, shift=0.2, look=dict(ms=7))
MISSING = style.Dots("accuracy")  # a single seed is not a gap, although it has no mean


def repeated(frame: pd.DataFrame, args) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per run, and one per variant that was trained with several seeds."""
    one, _ = frames.of_all_seeds(frame)
    return one, seeds.together(one, args.results / args.study / "runs")


def applies(frame, args) -> bool:
    """Whether a variant was trained with several seeds."""
    return not repeated(frame, args)[1].empty


def make(frame, args):
    one, means = repeated(frame, args)
    if means.empty:
        raise UserError(
            f"study {args.study} has no variant with several seeds; also run its scripts with "
            "--seed 1."
        )
    rows = frames.labels(means)
    figure, panels = style.panels(means, rows, width=2.4)
    for axes, model, part in panels:
        runs = one[one["model"] == model]
        style.gaps(axes, runs, rows, MISSING)
        style.dots(axes, runs, rows, SINGLE)
        style.dots(axes, part, rows, MEAN)
        style.baseline(axes, part, MEAN)
        axes.set_xlim(right=min(100, axes.get_xlim()[1]))
        axes.set_xlabel("Test accuracy (%)")
    style.sizes(figure, {SINGLE.look["ms"]: "one seed", MEAN.look["ms"]: "mean over seeds"})
    text = (
        "Accuracy over seeds (bars: 95 % intervals for other seeds and other images; "
        "dotted: mean of FP32)"
    )
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "over_seeds")


if __name__ == "__main__":
    script.run(make, __doc__)
