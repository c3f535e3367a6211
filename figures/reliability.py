"""Reliability diagram of every variant beside FP32's: how often it is a dog where the network is so sure of a dog.

python figures/reliability.py --study cats_and_dogs
"""

import numpy as np
import style
from matplotlib.patheffects import withStroke
from scipy.special import expit

from utils import stats

BINS = 15
SMALL = {"full": dict(ms=3, mew=0.7), "empty": dict(ms=3, mew=0.8, path_effects=[withStroke(linewidth=1.6, foreground="black")])}


def bins(probability, dog):
    """Mean probability, dogs and images of each of 15 equal bins that is not empty; bins are open on the left, as in `ece`."""
    edges = np.linspace(0, 1, BINS + 1)
    place = np.digitize(probability, edges[1:-1], right=True)
    own = [place == n for n in range(BINS) if (place == n).any()]
    return [(probability[chosen].mean(), int(dog[chosen].sum()), int(chosen.sum())) for chosen in own]


def diagram(row, args):
    with np.load(style.record(args, row, "npz")) as stored:
        logits = stored["logits"].astype(np.float64)
        return bins(expit(logits[:, 1] - logits[:, 0]), stored["y"])  # softmax of two


def main():
    frame, args = style.load(__doc__)
    frame = style.first_seed(frame)
    baselines = {row["model"]: diagram(row, args) for _, row in frame[frame["method"] == "fp32"].iterrows()}
    figure, panels = style.grid(frame, cell=0.95)
    for axes, row in panels:
        axes.plot([0, 1], [0, 1], color="0.5", lw=0.7, ls=":")
        if row["model"] in baselines:
            axes.plot(*zip(*((x, dogs / n) for x, dogs, n in baselines[row["model"]]), strict=True), color="black", lw=0.8)
        for x, dogs, n in diagram(row, args):
            low, high = stats.wilson(dogs, n)
            axes.plot([x, x], [low, high], color="0.55", lw=0.7)
            axes.plot(x, dogs / n, ls="", **style.look(row) | SMALL["empty" if row["method"] == "qat" else "full"])
        axes.text(0.95, 0.05, f"ECE {row['ece']:.3f}", transform=axes.transAxes, ha="right", fontsize=5.5)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.set_xticks([0, 0.5, 1], ["0", "", "1"], fontsize=5.5)
        axes.set_yticks([0, 0.5, 1], ["0", "", "1"], fontsize=5.5)
        axes.tick_params(pad=0)
    text = (
        "Reliability: share of dogs (up) against mean probability of a dog (right)\n"
        "in 15 equal bins, with 95 % Wilson intervals; line: FP32; ECE: of the decision's confidence"
    )
    figure.suptitle(style.title(frame, text), fontsize=8)
    style.save(figure, args.out, "reliability")


if __name__ == "__main__":
    main()
