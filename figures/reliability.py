"""Reliability of every method and format: positive share by predicted probability.

python figures/reliability.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from utils import stats

BINS = 15
FILLED = dict(ms=3, mew=0.7)
HOLLOW = dict(ms=3, mew=0.8, path_effects=[style.withStroke(linewidth=1.6, foreground="black")])


def bins(probability, positive):
    """Mean probability, positives and images of each of 15 equal bins with images.

    Bins are open on the left, as in `ece`.
    """
    edges = np.linspace(0, 1, BINS + 1)
    place = np.digitize(probability, edges[1:-1], right=True)
    filled = []
    for n in np.unique(place):
        chosen = place == n
        filled.append((probability[chosen].mean(), int(positive[chosen].sum()), int(chosen.sum())))
    return filled


def diagram(row, args):
    """Bins of a run's answers."""
    logits, y = runs.answers(runs.path(args, row, "npz"))
    logits = logits.astype(np.float64)
    return bins(expit(logits[:, 1] - logits[:, 0]), y)  # softmax of two


def make(frame, args):
    one = frames.usual(frame)
    fp32 = one[one["method"] == "fp32"]
    baselines = {row["model"]: diagram(row, args) for _, row in fp32.iterrows()}
    figure, panels = style.grid(one, cell=1.25, columns=5)
    for axes, row in panels:
        axes.plot([0, 1], [0, 1], color="0.5", lw=0.7, ls=":")
        if row["model"] in baselines:
            line = [(x, positives / n) for x, positives, n in baselines[row["model"]]]
            axes.plot(*zip(*line, strict=True), color="black", lw=0.8)
        look = style.look(row) | (FILLED if style.filled(row) else HOLLOW)
        for x, positives, n in diagram(row, args):
            low, high = stats.wilson(positives, n)
            axes.plot([x, x], [low, high], color="0.55", lw=0.7)
            axes.plot(x, positives / n, ls="", **look)
        corner = dict(transform=axes.transAxes, ha="right", fontsize=5.5)
        axes.text(0.95, 0.05, f"ECE {row['ece']:.3f}", **corner)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.set_xticks([0, 0.5, 1], ["0", "", "1"], fontsize=5.5)
        axes.set_yticks([0, 0.5, 1], ["0", "", "1"], fontsize=5.5)
        axes.tick_params(pad=0)
    positive = style.literal(frames.classes(frame)[1])
    text = (
        f"Reliability: observed share of class {positive} (vertical) against its mean predicted "
        "probability (horizontal)\n"
        "in 15 equal bins, with 95 % Wilson intervals; line: FP32; "
        "ECE: expected calibration error of the decision"
    )
    figure.suptitle(style.title(frame, text), fontsize=8)
    style.save(figure, args, "reliability")


if __name__ == "__main__":
    script.run(make, __doc__)
