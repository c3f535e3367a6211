"""Every timed run at the smallest batch size on all threads, in multiples of its network's median, with its percentiles in ms.

python figures/latency_distributions.py --study cats_and_dogs
"""

import numpy as np
import style
from matplotlib.patheffects import withStroke

from utils import results

HALO = [withStroke(linewidth=2, foreground="white")]  # seen on black, too
PERCENTILES = {"latency_ms_p50": "-", "latency_ms_p90": "--", "latency_ms_p99": ":"}


def samples(row, args):
    """All runs in ms, of every launch and round."""
    for timing in results.read(style.record(args, row))["timing"]:
        if (timing["threads"], timing["batch_size"]) == (row["threads"], row["batch_size"]):
            return np.array([time for launch in timing["samples_ms"] for around in launch for time in around])


def violin(axes, place, times, row):
    (body,) = axes.violinplot(times, [place], orientation="horizontal", widths=0.8, points=200, showextrema=False)["bodies"]
    colour = style.COLOUR[row["dtype"]]
    if row["method"] == "qat":
        body.set(facecolor="white", edgecolor=colour, alpha=1, lw=1.3)
    else:
        body.set(facecolor=colour, edgecolor="black", alpha=1, lw=0.6)


def digits(value):
    """Three digits: 1.83, 18.3, 183."""
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(value))))}f}"


def main():
    frame, args = style.load(__doc__)
    frame, batch = style.one_batch(frame)
    frame = style.first_seed(frame)
    rows = style.labels(frame)
    figure, panels = style.panels(frame, rows, width=2.6)
    for axes, _, own in panels:
        style.gaps(axes, own, rows, "latency_ms_p50")
        timed = own.dropna(subset="latency_ms_p50")
        right = 1 + 1.1 * max([0.1, *(timed["latency_ms_p99"] / timed["latency_ms_p50"] - 1)])
        for _, row in timed.iterrows():
            place, median = rows.index(row["series"]), row["latency_ms_p50"]
            times = samples(row, args) / median
            violin(axes, place, times[times <= right], row)
            for column, dashes in PERCENTILES.items():
                x = row[column] / median
                axes.plot([x, x], [place - 0.4, place + 0.4], color="black", lw=1, ls=dashes, path_effects=HALO)
            text = " / ".join(digits(row[column]) for column in PERCENTILES)
            axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=5.5)
        axes.set_xlim(right=right)
        axes.set_xlabel("Time of a run / median")
    text = f"Timed runs at batch {batch} (empty: QAT; axes end beyond p99)\nLines: p50, p90 dashed, p99 dotted; right: in ms"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args.out, "latency_distributions")


if __name__ == "__main__":
    main()
