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

SPREAD = 0.03  # of the decades of the axis: runs of one format have nearly the same size and would hide each other


def apart(sizes, decades):
    """Return sizes (n,) of which neighbours of the same size, to 2 %, are set side by side on a log axis."""
    placed = np.log10(sizes)
    groups = np.concatenate([[0], np.cumsum(np.diff(np.sort(placed)) > np.log10(1.02))])
    order = np.argsort(placed, kind="stable")
    for group in np.unique(groups):
        members = order[groups == group]
        placed[members] += SPREAD * decades * (np.arange(len(members)) - (len(members) - 1) / 2)
    return 10**placed


def draw(axes, runs):
    """Draw a model's runs with the intervals of their accuracy."""
    decades = np.log10(runs["size_mb"].max() / runs["size_mb"].min()) or 1
    for x, (_, row) in zip(
        apart(runs["size_mb"].to_numpy(), decades), runs.iterrows(), strict=True
    ):
        y, low, high = (
            100 * row[name] for name in ("accuracy", "accuracy_ci_low", "accuracy_ci_high")
        )
        axes.errorbar(x, y, yerr=[[y - low], [high - y]], ecolor="0.75", elinewidth=0.7)
        axes.plot(x, y, ls="", zorder=3, **style.look(row))
    axes.margins(0.08, 0.1)
    style.log_scale(axes.xaxis)


def make(frame, args):
    frame = frames.one_batch(frame)[0].dropna(subset=["size_mb", "accuracy"])
    models = frames.present(frame)
    if not models:
        raise UserError(f"study {args.study} has no deployed runs yet.")
    size = dict(
        figsize=(2.6 * max(2, len(models)), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    figure, panels = plt.subplots(1, len(models), **size)
    for axes, model in zip(panels[0], models, strict=True):
        draw(axes, frame[frame["model"] == model])
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
        axes.set_xlabel("MiB (log scale)")
    panels[0][0].set_ylabel("Test accuracy (%)")
    panels[0][0].set_ylim(top=min(100, panels[0][0].get_ylim()[1]))
    figure.legend(
        handles=style.legend(frame), fontsize=7, loc="outside lower center", ncols=4, frameon=False
    )
    text = "Accuracy against the size of the deployed file\n(files of nearly the same size side by side; bars: 95 % intervals)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "accuracy_vs_size")


if __name__ == "__main__":
    script.run(make, __doc__)
