"""The dissertation's accuracies beside this study's, with our interval, model by model.

python figures/published_vs_reproduced.py --study cats_and_dogs
"""

import pandas as pd
import published
import style
from style import plt

OTHER = dict(marker="x", color="black", ls="", ms=5, mew=1.3, zorder=4)


def pairs(frame, model):
    """(label, published accuracies, our row or None) of each variant that was published for a model."""
    found = {}
    for _, row in published.load().query("model == @model").iterrows():
        fake = row["variant"] == "fake-quant"
        label = published.label(row, "fake-quant (simulated)" if fake else row["backend_here"])
        found.setdefault(label, ([], published.match(row, frame)))[0].append(row["accuracy_pct"])
    order = {name: n for n, name in enumerate(style.DTYPES.values())}
    ranked = sorted(found, key=lambda label: ("QAT" in label, order[label.split()[0]], label))
    return [(label, *found[label]) for label in ranked]


def main():
    frame, args = style.load(__doc__)
    if not frame["study"].str.startswith("cats_and_dogs").all():
        raise SystemExit(f"error: the published figures are of cats_and_dogs; study {args.study} is of other images.")
    frame, _ = style.one_batch(frame)
    models = style.present(frame)
    cells = {model: pairs(frame, model) for model in models}
    heights = [len(cells[model]) for model in models]
    size = dict(figsize=(7, 1.3 + 0.27 * sum(heights) + 0.35 * len(models)), height_ratios=heights, layout="constrained")
    figure, panels = plt.subplots(len(models), 1, sharex=True, squeeze=False, **size)
    for axes, model in zip(panels[:, 0], models, strict=True):
        labels = [label for label, _, _ in cells[model]]
        ours = pd.DataFrame([row.to_dict() | {"cell": label} for label, _, row in cells[model] if row is not None],
            columns=[*frame.columns, "cell"])  # fmt: skip
        style.dots(axes, ours, labels, "accuracy", "accuracy_ci", by="cell", scale=100, shift=0.18)
        style.gaps(axes, ours, labels, "accuracy", by="cell", what="here ")
        for place, (_, values, _) in enumerate(cells[model]):
            axes.plot(values, [place - 0.18] * len(values), **OTHER)
        axes.set_title(style.MODELS[model], fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("Test accuracy (%)")
    text = "Accuracy published (crosses) and reproduced (marks with 95 % Wilson intervals)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args.out, "published_vs_reproduced")


if __name__ == "__main__":
    main()
