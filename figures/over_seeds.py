"""Accuracy of the variants that were trained with several seeds: each seed, and their mean.

python figures/over_seeds.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, seeds, style
from utils.errors import UserError

EACH = style.Dots("accuracy", scale=100, shift=-0.2, look=dict(ms=4))
MEAN = style.Dots("accuracy", "accuracy_ci", scale=100, shift=0.2, look=dict(ms=7))


def repeated(frame: pd.DataFrame, args) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row for each run, and one for each variant that was trained with several seeds."""
    one, _ = frames.of_all_seeds(frame)
    return one, seeds.together(one, args.results / args.study / "runs")


def applies(frame, args) -> bool:
    """Whether a variant was trained with several seeds."""
    return not repeated(frame, args)[1].empty


def make(frame, args):
    one, means = repeated(frame, args)
    if means.empty:
        raise UserError(
            f"study {args.study} has no variant with several seeds; run its scripts with --seed 1, too."
        )
    rows = frames.labels(means)
    figure, panels = style.panels(means, rows, width=2.4)
    for axes, model, runs in panels:
        each = one[one["model"] == model]
        style.gaps(
            axes, each, rows, style.Dots("accuracy")
        )  # one seed is no gap, though it has no mean
        style.dots(axes, each, rows, EACH)
        style.dots(axes, runs, rows, MEAN)
        style.baseline(axes, runs, MEAN)
        axes.set_xlim(right=min(100, axes.get_xlim()[1]))
        axes.set_xlabel("Test accuracy (%)")
    style.sizes(figure, {EACH.look["ms"]: "one seed", MEAN.look["ms"]: "mean over seeds"})
    text = "Accuracy over seeds (bars: 95 % intervals for other seeds and other images; dotted: mean of FP32)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "over_seeds")


if __name__ == "__main__":
    script.run(make, __doc__)
