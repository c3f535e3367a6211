"""Accuracy against the size of the deployed file.

python figures/accuracy_vs_size.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from figures.shared.style import plt
from utils import catalog
from utils.errors import UserError

SAME = 1.02  # a larger ratio of two sizes makes them different
# Runs of one format have nearly the same size and would hide each other. They are moved apart by
# this share of the decades of the axis.
SPREAD = 0.03


def apart(sizes, decades):
    """Move sizes (n,) that are the same to 2 % apart on a log axis, side by side."""
    logs = np.log10(sizes)
    groups = np.concatenate([[0], np.cumsum(np.diff(np.sort(logs)) > np.log10(SAME))])
    order = np.argsort(logs, kind="stable")
    for group in np.unique(groups):
        members = order[groups == group]
        logs[members] += SPREAD * decades * (np.arange(len(members)) - (len(members) - 1) / 2)
    return 10**logs


def draw(axes, runs):
    """Draw a model's runs with the intervals of their accuracy."""
    decades = np.log10(runs["size_mb"].max() / runs["size_mb"].min()) or 1
    places = apart(runs["size_mb"].to_numpy(), decades)
    for x, (_, row) in zip(places, runs.iterrows(), strict=True):
        y = 100 * row["accuracy"]
        yerr = [[y - 100 * row["accuracy_ci_low"]], [100 * row["accuracy_ci_high"] - y]]
        axes.errorbar(x, y, yerr=yerr, ecolor="0.75", elinewidth=0.7)
        axes.plot(x, y, ls="", zorder=3, **style.look(row))
    axes.margins(0.08, 0.1)
    style.log_scale(axes.xaxis)


def make(frame, args):
    frame = frames.one_batch(frame)[0].dropna(subset=["size_mb", "accuracy"])
    models = frames.present(frame)
    if not models:
        raise UserError(f"study {args.study} has no deployed runs yet.")
    size = dict(figsize=(2.6 * max(2, len(models)), 3.4), layout="constrained")
    figure, panels = plt.subplots(1, len(models), sharey=True, squeeze=False, **size)
    for axes, model in zip(panels[0], models, strict=True):
        draw(axes, frame[frame["model"] == model])
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
        axes.set_xlabel("MiB (log scale)")
    panels[0][0].set_ylabel("Test accuracy (%)")
    panels[0][0].set_ylim(top=min(100, panels[0][0].get_ylim()[1]))
    figure.legend(handles=style.legend(frame), fontsize=7, ncols=4, **style.LEGEND_BELOW)
    text = (
        "Accuracy against the size of the deployed file\n"
        "(files of nearly the same size side by side; bars: 95 % intervals)"
    )
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "accuracy_vs_size")


if __name__ == "__main__":
    script.run(make, __doc__)
