"""Accuracy of every deployed network, with its interval, beside its FP32 baseline.

python figures/accuracy_by_dtype.py --study cats_and_dogs
"""

import style
from style import plt


def main():
    frame, args = style.load(__doc__)
    frame = frame.drop_duplicates(["model", "series", "seed"])
    models = [name for name in style.MODELS if name in set(frame["model"])]
    series = list(frame.sort_values(["method", "dtype", "backend"])["series"].unique())
    size = (2.2 + 1.9 * len(models), 1.3 + 0.27 * len(series))
    figure, panels = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, model in zip(panels[0], models, strict=True):
        own = frame[frame["model"] == model].set_index("series")
        for place, name in enumerate(series):
            if name not in own.index:
                axes.text(0.5, place, "not run", transform=axes.get_yaxis_transform(), ha="center", va="center", color="0.5")
                continue
            for _, row in own.loc[[name]].iterrows():
                low, y, high = (100 * row[c] for c in ("accuracy_ci_low", "accuracy", "accuracy_ci_high"))
                axes.errorbar(
                    y, place, xerr=[[y - low], [high - y]], marker=style.MARKER[model], color=style.COLOUR[row["dtype"]],
                    ecolor="0.4", capsize=2, markeredgecolor="black", markersize=7,
                    fillstyle="none" if row["method"] == "qat" else "full",
                )  # fmt: skip
        baseline = own[own["method"] == "fp32"]["accuracy"]
        for value in baseline:
            axes.axvline(100 * value, color="black", lw=0.8, ls=":", zorder=0)
        axes.set_title(style.MODELS[model], fontsize=9)
        axes.set_xlabel("Test accuracy (%)")
        axes.set_ylim(len(series) - 0.5, -0.5)
    panels[0][0].set_yticks(range(len(series)), series)
    figure.suptitle(style.title(frame, "Accuracy by number format (95 % Wilson intervals; dotted: FP32)"), fontsize=9)
    style.save(figure, args.out, "accuracy_by_dtype")


if __name__ == "__main__":
    main()
