"""The dissertation's accuracies next to this study's, with intervals, model by model.

python figures/published_vs_reproduced.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, published, script, style
from figures.shared.style import plt
from utils import catalog
from utils.errors import UserError

CROSS = dict(color="black", ls="", mew=1.3, zorder=4)
CROSSES = {
    "as named": CROSS | dict(marker="x", ms=5),
    published.ELSE: CROSS | dict(marker="+", ms=7),
}
MARKS = style.Dots("accuracy", "accuracy_ci", scale=100, by="cell", shift=0.18)
MISSING = style.Dots("accuracy", by="cell")


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return frames.is_dissertations(frame)


def pairs(frame, model):
    """List (label, accuracies by what they measured, our row or None) of a model's variants."""
    variants, rank = {}, {}
    rows = published.load()
    for _, row in rows[rows["model"] == model].iterrows():
        fake = row["variant"] == "fake-quant"
        label = published.label(row, "fake-quant (simulated)" if fake else row["backend_here"])
        if label not in variants:
            accuracies = {measured: [] for measured in CROSSES}
            variants[label] = accuracies, published.match(row, frame)
        variants[label][0][row["measured"]].append(row["accuracy_pct"])
        method = list(catalog.METHODS).index(published.METHOD_OF_NAME[row["method"]])
        rank[label] = (method, list(catalog.FORMATS).index(row["dtype"]), label)
    return [(label, *variants[label]) for label in sorted(variants, key=rank.get)]


def draw(axes, cells, columns):
    """Draw a model's variants: our runs, and a cross per published accuracy."""
    labels = [label for label, _, _ in cells]
    ours = [row.to_dict() | {"cell": label} for label, _, row in cells if row is not None]
    ours = pd.DataFrame(ours, columns=[*columns, "cell"])
    style.dots(axes, ours, labels, MARKS)
    style.gaps(axes, ours, labels, MISSING, "{} here")
    for place, (_, accuracies, _) in enumerate(cells):
        for measured, values in accuracies.items():
            axes.plot(values, [place - 0.18] * len(values), **CROSSES[measured])
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def make(frame, args):
    if not applies(frame, args):
        raise UserError(
            f"the published figures are about cats_and_dogs; study {args.study} has other images."
        )
    frame, _ = frames.one_batch(frame)
    models = frames.present(frame)
    cells = {model: pairs(frame, model) for model in models}
    heights = [len(cells[model]) for model in models]
    height = 1.3 + 0.27 * sum(heights) + 0.35 * len(models)
    size = dict(figsize=(7, height), height_ratios=heights, layout="constrained")
    figure, panels = plt.subplots(len(models), 1, sharex=True, squeeze=False, **size)
    for axes, model in zip(panels[:, 0], models, strict=True):
        draw(axes, cells[model], frame.columns)
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
    axes.set_xlabel("Test accuracy (%)")
    text = (
        "Published accuracy (crosses) and reproduced accuracy (marks with 95 % Wilson intervals)\n"
        "Upright crosses: published figures that measured something other than the variant"
    )
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, published.FIGURE)


if __name__ == "__main__":
    script.run(make, __doc__)
