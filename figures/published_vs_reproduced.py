"""The dissertation's accuracies beside this study's with their intervals, model by model.

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

OTHER = dict(color="black", ls="", mew=1.3, zorder=4)
SIGNS = {"as named": dict(marker="x", ms=5), published.ELSE: dict(marker="+", ms=7)}
MARKS = style.Dots("accuracy", "accuracy_ci", scale=100, by="cell", shift=0.18)


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return frames.is_dissertations(frame)


def pairs(frame, model):
    """List (label, published accuracies by what they are of, our row or None) of each variant published for a model."""
    variants, rank = {}, {}
    for _, row in published.load().query("model == @model").iterrows():
        fake = row["variant"] == "fake-quant"
        label = published.label(row, "fake-quant (simulated)" if fake else row["backend_here"])
        known = variants.setdefault(
            label, ({what: [] for what in SIGNS}, published.match(row, frame))
        )[0]
        known[row["measured"]].append(row["accuracy_pct"])
        method = list(catalog.METHODS).index(published.METHODS[row["method"]])
        rank[label] = (method, list(catalog.FORMATS).index(row["dtype"]), label)
    return [(label, *variants[label]) for label in sorted(variants, key=rank.get)]


def make(frame, args):
    if not applies(frame, args):
        raise UserError(
            f"the published figures are of cats_and_dogs; study {args.study} is of other images."
        )
    frame, _ = frames.one_batch(frame)
    models = frames.present(frame)
    cells = {model: pairs(frame, model) for model in models}
    heights = [len(cells[model]) for model in models]
    size = dict(
        figsize=(7, 1.3 + 0.27 * sum(heights) + 0.35 * len(models)),
        height_ratios=heights,
        layout="constrained",
    )
    figure, panels = plt.subplots(len(models), 1, sharex=True, squeeze=False, **size)
    for axes, model in zip(panels[:, 0], models, strict=True):
        labels = [label for label, _, _ in cells[model]]
        ours = pd.DataFrame([row.to_dict() | {"cell": label} for label, _, row in cells[model] if row is not None],
            columns=[*frame.columns, "cell"])  # fmt: skip
        style.dots(axes, ours, labels, MARKS)
        style.gaps(axes, ours, labels, style.Dots("accuracy", by="cell"), "here ")
        for place, (_, known, _) in enumerate(cells[model]):
            for what, values in known.items():
                axes.plot(values, [place - 0.18] * len(values), **OTHER, **SIGNS[what])
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("Test accuracy (%)")
    text = "Accuracy published (crosses) and reproduced (marks with 95 % Wilson intervals)\n"
    text += f"Upright crosses are published, too, but of {published.ELSE} than the variant"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, published.FIGURE)


if __name__ == "__main__":
    script.run(make, __doc__)
