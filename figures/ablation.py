"""INT8 step by step: accuracy and signal-to-noise ratio after each step of the method.

    python figures/ablation.py --study cats_and_dogs

Draws ablation.csv, which quantization/ablation.py writes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import ablations, script, style
from figures.shared.style import Line2D, plt
from utils import catalog

COLOUR = catalog.FORMATS["int8"].colour
DOT = dict(marker="o", color=COLOUR, mec="black", ms=6)
LOOKS = {
    "tool": dict(marker="D", mfc="0.75", mec="black", ms=5),
    "stacked": DOT,
    "trained": DOT | dict(marker="s"),
    "alone": dict(marker="o", mfc="white", mec=COLOUR, ms=6),
    "varied": DOT | dict(marker="^"),
    "cause": dict(marker="X", mfc="white", mec=COLOUR, ms=7),
}
LEGEND = {
    "tool": "default of a tool",
    "stacked": "on top of the steps above",
    "trained": "trained, starting from post-training quantization",
    "alone": "alone, with a weight scale for each channel",
    "varied": "the study's PTQ recipe, varied",
    "cause": "the plainest, by the scales that it has",
}
NARROW = "for processors without VNNI"  # a step of quantization/ablation.py
# Distance of the marks below the middle of their row, in rows.
SHIFTS = {
    "tool": 0.0,
    "stacked": -0.13,
    "trained": -0.13,
    "alone": 0.13,
    "varied": 0.0,
    "cause": 0.0,
}


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return not ablations.read(args).empty


def labels(rows):
    """Label each row of a panel by the name of its step, which may be both stacked and alone."""
    names = {
        step: f"{step}'s default" if kind == "tool" else step
        for step, kind in zip(rows["rung"], rows["kind"], strict=True)
    }
    overflowed = rows["rung"][rows["overflow"] == "all"] if "overflow" in rows else ()
    if NARROW in names and NARROW not in set(overflowed):
        names[NARROW] = f"{NARROW}\n(measured with VNNI: arithmetic only)"
    return names


def caveats(rows):
    """List what a reader of a panel must know: mixed code, and steps unlike the script's run."""
    lines = []
    if "method_code" in rows and (versions := rows["method_code"].nunique()) > 1:
        lines.append(f"{versions} versions of the method's code made these steps")
    if "study_agreement_fp32" in rows:
        for _, row in rows.dropna(subset="study_agreement_fp32").iterrows():
            here, there = row["test_agreement_fp32"], row["study_agreement_fp32"]
            if here != there:
                lines.append(
                    f"{row['rung']}: agrees with FP32 on {here:.2%}, and on {there:.2%} in the "
                    "script's run, by other code, threads or processor"
                )
    return lines


def draw(axes, rows, column, scale):
    """Draw a column of a model's steps, with its interval if it has one."""
    low, high = f"{column}_ci_low", f"{column}_ci_high"
    places = list(labels(rows))
    for kind, look in LOOKS.items():
        part = rows[rows["kind"] == kind]
        x = scale * part[column]
        y = [places.index(step) + SHIFTS[kind] for step in part["rung"]]
        if low in part:
            ends = [scale * (part[column] - part[low]), scale * (part[high] - part[column])]
            axes.errorbar(x, y, xerr=ends, ls="", ecolor="0.4", capsize=2, zorder=1)
        if kind == "stacked":
            axes.plot(x, y, color="0.6", lw=0.8, zorder=1)
        axes.plot(x, y, ls="", zorder=3, **look)


def make(frame, args):
    groups = ablations.groups(args)
    heights = [0.7 + 0.27 * len(labels(rows)) for _, _, rows in groups]
    notes = []
    size = dict(figsize=(7.5, 1.2 + sum(heights)), height_ratios=heights, layout="constrained")
    figure, panels = plt.subplots(len(groups), 2, squeeze=False, sharey="row", **size)
    for (left, right), (model, backend, rows) in zip(panels, groups, strict=True):
        draw(left, rows, "test_accuracy", 100)
        draw(right, rows, "test_sqnr_db", 1)
        left.axvline(100 * rows["test_accuracy_fp32"].iloc[0], color="black", lw=0.8, ls=":")
        names = list(labels(rows).values())
        left.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        left.set_yticklabels(names, fontsize=7.5)
        left.set_xlabel("accuracy (%), dotted: FP32", fontsize=8)
        right.set_xlabel("SQNR of the logits (dB)", fontsize=8)
        for axes in (left, right):
            axes.ticklabel_format(axis="x", useOffset=False)
        left.set_title(ablations.heading(model, backend), fontsize=9, loc="left")
        notes.extend(f"{ablations.heading(model, backend)}: {line}." for line in caveats(rows))
    shown = {kind for _, _, rows in groups for kind in rows["kind"]}
    handles = [
        Line2D([], [], label=LEGEND[kind], ls="", **look)
        for kind, look in LOOKS.items()
        if kind in shown
    ]
    figure.legend(handles=handles, ncols=2, fontsize=7.5, **style.LEGEND_BELOW)
    images = int(groups[0][2]["test_images"].max())
    text = f"INT8 step by step, each network on its engine; {images} test images"
    figure.suptitle("\n".join([text, *notes]), fontsize=9 if not notes else 7.5)
    style.save(figure, args, "ablation")


if __name__ == "__main__":
    script.run(make, __doc__)
