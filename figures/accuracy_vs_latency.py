"""Accuracy against latency at batch 1: up and to the left is better.

python figures/accuracy_vs_latency.py --study cats_and_dogs
"""

from collections import Counter

import style
from matplotlib.lines import Line2D
from style import plt

# Where the engine's name goes, in points from its marker: neighbours of one model take turns, so that they do not overlap.
LABELS = ((0, 10), (0, -11))


def main():
    frame, args = style.load(__doc__)
    frame, batch = style.one_batch(frame)
    frame = frame.dropna(subset="latency_ms_p50")  # simulated networks have none
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    turn = Counter()
    for _, row in frame.sort_values("latency_ms_p50").iterrows():
        x, y = row["latency_ms_p50"], 100 * row["accuracy"]
        axes.errorbar(
            x, y,
            xerr=[[max(0, x - row["latency_ms_ci_low"])], [max(0, row["latency_ms_ci_high"] - x)]],
            yerr=[[y - 100 * row["accuracy_ci_low"]], [100 * row["accuracy_ci_high"] - y]],
            marker=style.MARKER[row["model"]], color=style.COLOUR[row["dtype"]], ecolor="0.6", elinewidth=0.8,
            markeredgecolor="black", markersize=8, zorder=3,
            fillstyle="none" if row["method"] == "qat" else "full",
        )  # fmt: skip
        if row["method"] != "fp32":  # black says that already
            label = dict(textcoords="offset points", fontsize=6.5, color="0.2", ha="center", va="center")
            axes.annotate(row["backend"], (x, y), xytext=LABELS[turn[row["model"]] % len(LABELS)], **label)
            turn[row["model"]] += 1
    axes.set(xscale="log", xlabel=f"Latency at batch {batch}, median (ms, log scale)", ylabel="Test accuracy (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=6)
    axes.set_title(style.title(frame, "Accuracy against latency (bars: 95 % intervals)"), fontsize=9)
    models = [name for name in style.MODELS if name in set(frame["model"])]
    dtypes = [name for name in style.DTYPES if name in set(frame["dtype"])]
    handles = [Line2D([], [], ls="", marker=style.MARKER[m], mfc="white", mec="black", label=style.MODELS[m]) for m in models]
    handles += [Line2D([], [], ls="", marker="D", mfc=style.COLOUR[d], mec="black", label=style.DTYPES[d]) for d in dtypes]
    axes.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    style.save(figure, args.out, "accuracy_vs_latency")


if __name__ == "__main__":
    main()
