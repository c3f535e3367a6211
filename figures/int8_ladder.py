"""INT8 rung by rung: accuracy and signal-to-noise ratio of each step of the method.

    python figures/int8_ladder.py --study cats_and_dogs

Draws ladder.csv, which quantization/int8_ladder.py writes.
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import script, style
from figures.shared.style import plt
from utils import catalog
from utils.errors import UserError

COLOUR = catalog.FORMATS["int8"].colour
FILLED = dict(marker="o", ls="", color=COLOUR, mec="black", ms=6)
HOLLOW = dict(marker="o", ls="", mfc="white", mec=COLOUR, mew=1.4, ms=6)


def read(args):
    """Read ladder.csv of the study; an empty frame if there is none."""
    path = args.results / args.study / "ladder.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return not read(args).empty


def draw(axes, rows, names, column, scale):
    """Draw one column of a model's rungs: stacked ones filled and joined, those alone hollow."""
    low, high = f"{column}_ci_low", f"{column}_ci_high"
    for stacked, shift, look in ((True, -0.13, FILLED), (False, 0.13, HOLLOW)):
        part = rows[rows["stacked"] == stacked]
        y = [names.index(name) + shift for name in part["rung"]]
        if low in part:
            ends = [scale * (part[column] - part[low]), scale * (part[high] - part[column])]
            axes.errorbar(scale * part[column], y, xerr=ends, ls="", ecolor="0.4", capsize=2, zorder=1)
        if stacked:
            axes.plot(scale * part[column], y, color="0.6", lw=0.8, zorder=1)
        axes.plot(scale * part[column], y, zorder=3, **look)


def make(frame, args):
    rungs = read(args)
    if rungs.empty:
        raise UserError(f"study {args.study} has no ladder.csv yet; run quantization/int8_ladder.py.")
    groups = [(model, backend) for model in catalog.MODELS for backend in rungs["backend"].unique()
              if ((rungs["model"] == model) & (rungs["backend"] == backend)).any()]  # fmt: skip
    names = list(rungs.sort_values("place", kind="stable")["rung"].unique())
    size = (7.5, 1.2 + len(groups) * (0.7 + 0.3 * len(names)))
    figure, panels = plt.subplots(len(groups), 2, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for pair, (model, backend) in zip(panels, groups, strict=True):
        rows = rungs[(rungs["model"] == model) & (rungs["backend"] == backend)]
        draw(pair[0], rows, names, "test_accuracy", 100)
        draw(pair[1], rows, names, "test_sqnr_db", 1)
        pair[0].axvline(100 * rows["test_accuracy_fp32"].iloc[0], color="black", lw=0.8, ls=":")
        pair[0].set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        pair[0].set_yticklabels(names, fontsize=7.5)
        for axes, what in zip(pair, ("accuracy (%), dotted: FP32", "SQNR of the logits (dB)"), strict=True):
            axes.set_xlabel(what, fontsize=8)
            axes.ticklabel_format(axis="x", useOffset=False)
            axes.set_title(f"{catalog.MODELS[model].label}, roundings of {backend}", fontsize=9)
    handles = [Line2D([], [], label="on top of the rungs above", **FILLED)]
    handles.append(Line2D([], [], label="alone, on weights with a scale for each channel", **HOLLOW))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    images = int(rungs["test_images"].max())
    figure.suptitle(f"INT8 by post-training quantization in exact arithmetic, {images} test images", fontsize=9)
    style.save(figure, args, "int8_ladder")


if __name__ == "__main__":
    script.run(make, __doc__)
