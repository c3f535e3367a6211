"""INT8 rung by rung: accuracy and signal-to-noise ratio of each step of the method.

    python figures/ablation.py --study cats_and_dogs

Draws ablation.csv, which quantization/ablation.py writes.
"""

import sys
from pathlib import Path

from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import ablations, script, style
from figures.shared.style import plt
from utils import catalog

COLOUR = catalog.FORMATS["int8"].colour
MARKS = {  # kind of rung: its look, what it is in the legend, and how far it lies below the middle of its row
    "tool": (dict(marker="D", mfc="0.75", mec="black", ms=5), "default of a tool", 0.0),
    "stacked": (
        dict(marker="o", color=COLOUR, mec="black", ms=6),
        "on top of the rungs above",
        -0.13,
    ),
    "trained": (
        dict(marker="s", color=COLOUR, mec="black", ms=6),
        "trained, from post-training quantization",
        -0.13,
    ),
    "alone": (
        dict(marker="o", mfc="white", mec=COLOUR, ms=6),
        "alone, with a weight scale for each channel",
        0.13,
    ),
    "varied": (
        dict(marker="^", color=COLOUR, mec="black", ms=6),
        "the study's recipe of PTQ, varied",
        0.0,
    ),
}


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return not ablations.read(args).empty


def labels(rows):
    """Return the label of each row of a panel by the name of its rungs, which may be stacked and alone."""
    return {
        rung: f"{rung}'s default" if kind == "tool" else rung
        for rung, kind in zip(rows["rung"], rows["kind"], strict=True)
    }


def draw(axes, rows, column, scale):
    """Draw one column of a model's rungs, with its interval if it has one."""
    low, high = f"{column}_ci_low", f"{column}_ci_high"
    places = list(labels(rows))
    for kind, (look, _, shift) in MARKS.items():
        part = rows[rows["kind"] == kind]
        y = [places.index(rung) + shift for rung in part["rung"]]
        if low in part:
            ends = [scale * (part[column] - part[low]), scale * (part[high] - part[column])]
            axes.errorbar(
                scale * part[column], y, xerr=ends, ls="", ecolor="0.4", capsize=2, zorder=1
            )
        if kind == "stacked":
            axes.plot(scale * part[column], y, color="0.6", lw=0.8, zorder=1)
        axes.plot(scale * part[column], y, ls="", zorder=3, **look)


def make(frame, args):
    groups = ablations.groups(args)
    heights = [0.7 + 0.27 * len(labels(rows)) for _, _, rows in groups]
    size = dict(figsize=(7.5, 1.2 + sum(heights)), height_ratios=heights, layout="constrained")
    figure, panels = plt.subplots(len(groups), 2, squeeze=False, sharey="row", **size)
    for pair, (model, backend, rows) in zip(panels, groups, strict=True):
        draw(pair[0], rows, "test_accuracy", 100)
        draw(pair[1], rows, "test_sqnr_db", 1)
        pair[0].axvline(100 * rows["test_accuracy_fp32"].iloc[0], color="black", lw=0.8, ls=":")
        names = list(labels(rows).values())
        pair[0].set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        pair[0].set_yticklabels(names, fontsize=7.5)
        for axes, what in zip(
            pair, ("accuracy (%), dotted: FP32", "SQNR of the logits (dB)"), strict=True
        ):
            axes.set_xlabel(what, fontsize=8)
            axes.ticklabel_format(axis="x", useOffset=False)
        pair[0].set_title(ablations.heading(model, backend), fontsize=9, loc="left")
    shown = {kind for _, _, rows in groups for kind in rows["kind"]}
    handles = [
        Line2D([], [], label=label, ls="", **look)
        for kind, (look, label, _) in MARKS.items()
        if kind in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    images = int(groups[0][2]["test_images"].max())
    figure.suptitle(
        f"INT8 step by step, each network on its engine; {images} test images", fontsize=9
    )
    style.save(figure, args, "ablation")


if __name__ == "__main__":
    script.run(make, __doc__)
