"""Accuracy of PTQ and QAT minus FP32 accuracy, with the margin declared beforehand.

python figures/ptq_vs_qat.py --study cats_and_dogs
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from utils import catalog
from utils.errors import UserError

CONTROL = "control (FP32)"
QUANTIZING = [name for name, method in catalog.METHODS.items() if method.quantizes]
MARKS = style.Dots("accuracy_difference", "accuracy_difference_ci", scale=100, by="cell")


def shift(method):
    """Distance of a method's marks below the middle of the row, which quantizing methods share."""
    if method not in QUANTIZING:
        return 0
    return 0.4 * (QUANTIZING.index(method) / (len(QUANTIZING) - 1) - 0.5)


def make(frame, args):
    frame, _ = frames.one_batch(frame)
    frame = frame[frame["method"] != "fp32"]
    if frame.empty:
        raise UserError(f"study {args.study} has no quantized runs yet.")
    frame = frame.assign(cell=frame["deployment"].where(frame["method"] != "control", CONTROL))
    rows = frames.labels(frame, "cell")
    figure, panels = style.panels(frame, rows)
    for axes, _, runs in panels:
        for method in ("control", *QUANTIZING):
            part, marks = runs[runs["method"] == method], replace(MARKS, shift=shift(method))
            of_some_model = set(frame.loc[frame["method"] == method, "cell"])
            expected = [name if name in of_some_model else "" for name in rows]
            form = f"{catalog.METHODS[method].label} {{}}" if method in QUANTIZING else "{}"
            style.gaps(axes, part, expected, marks, form)
            style.dots(axes, part, expected, marks)
        axes.axvline(0, color="black", lw=0.8, zorder=1)
        for margin in set(runs["margin"].dropna()):
            axes.axvline(-100 * margin, color="black", lw=1.2, ls="--", zorder=1)
        axes.set_xlabel("Difference to FP32 (points)")
    text = (
        "Accuracy against FP32 on the same images\n"
        f"(filled: {style.methods(filled=True)}, hollow: {style.methods(filled=False)}; "
        "95 % intervals; dashed: the margin)"
    )
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "ptq_vs_qat")


if __name__ == "__main__":
    script.run(make, __doc__)
