"""Accuracy against time, relative to the machine's fastest FP32, with Pareto fronts.

    python figures/accuracy_vs_latency.py --study cats_and_dogs

Milliseconds of different runs do not compare, because the machine may have been busier during one
of them. So each run is placed at its time over the fastest FP32's time in the same rounds.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from figures.shared.style import Line2D, plt
from utils import catalog
from utils.errors import UserError

FASTEST = dict(marker="X", color="white", mec="black", ms=8)
FRONT = dict(color="black", lw=1, ls="--")
BOTTOM_RIGHT = dict(x=0.99, y=0.03)  # of a panel


def placed(frame):
    """Add `time` over the fastest FP32 in the same rounds, with its interval `low` to `high`."""
    ends = {"time": "", "low": "_ci_high", "high": "_ci_low"}
    times = {name: 1 / frame[f"speedup_vs_best_fp32{end}"] for name, end in ends.items()}
    return frame.assign(**times)


def fastest(runs):
    """Return (time, accuracy) and engine of a model's fastest FP32, with its FP32 accuracy."""
    accuracy = runs.loc[runs["method"] == "fp32", "accuracy"]
    return (1.0, accuracy.iloc[0] if len(accuracy) else np.nan), runs["best_fp32"].mode()[0]


def front(points):
    """Select the points (time, accuracy) that no other beats in both, fastest first."""
    kept = []
    for time, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or accuracy > kept[-1][1]:
            kept.append((time, accuracy))
    return kept


def named(runs):
    """List (time, accuracy in percent, engine) of labelled points, first the front."""
    best, engine = fastest(runs)
    runs = runs[runs["method"] != "fp32"]  # its black mark needs no label
    names = runs["backend"].where(runs["method"] != "control", "control")
    points = zip(runs["time"], runs["accuracy"], strict=True)
    labelled = [(best, engine), *zip(points, names, strict=True)]
    ahead = front(point for point, _ in labelled if not np.isnan(point[1]))
    labelled.sort(key=lambda pair: pair[0] not in ahead)
    return [(time, 100 * accuracy, name) for (time, accuracy), name in labelled]


def draw(axes, runs):
    """Draw a model's runs with intervals in both directions, the fastest FP32 and the front."""
    for _, row in runs.iterrows():
        x, y = row["time"], 100 * row["accuracy"]
        xerr = [[max(0, x - row["low"])], [max(0, row["high"] - x)]]
        yerr = [[y - 100 * row["accuracy_ci_low"]], [100 * row["accuracy_ci_high"] - y]]
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, ecolor="0.75", elinewidth=0.7)
        axes.plot(x, y, ls="", zorder=3, **style.look(row))
    (time, accuracy), _ = fastest(runs)
    axes.axvline(time, color="black", lw=0.8, ls=":", zorder=1)
    axes.plot(time, 100 * accuracy, ls="", zorder=3, **FASTEST)
    points = list(zip(runs["time"], runs["accuracy"], strict=True))
    if not np.isnan(accuracy):
        points.append((time, accuracy))
    times, accuracies = np.array(front(points)).T
    axes.step(times, 100 * accuracies, where="post", zorder=2, **FRONT)


def make(frame, args):
    frame, batch = frames.one_batch(frame)
    frame = placed(frame.dropna(subset="speedup_vs_best_fp32"))
    models = frames.present(frame)
    if not models:
        raise UserError(f"study {args.study} has no timed runs yet.")
    size = dict(figsize=(7.2, 1.3 + 2.0 * len(models)), layout="constrained")
    figure, panels = plt.subplots(len(models), 1, sharey=True, squeeze=False, **size)
    for axes, model in zip(panels[:, 0], models, strict=True):
        runs = frame[frame["model"] == model]
        draw(axes, runs)
        style.missing(axes, frames.labels(frame), runs, BOTTOM_RIGHT)
        axes.set_ylabel(f"{catalog.MODELS[model].label}\nTest accuracy (%)", fontsize=8)
        axes.margins(0.06, 0.1)
        style.log_scale(axes.xaxis)
    axes.set_ylim(top=min(100, axes.get_ylim()[1]))
    axes.set_xlabel(
        f"Time at batch {batch}, relative to the fastest FP32 in the same rounds (log scale)"
    )
    more = (
        Line2D([], [], ls="", label="fastest FP32", **FASTEST),
        Line2D([], [], label="Pareto front of the model", **FRONT),
    )
    figure.legend(handles=style.legend(frame, *more), fontsize=7, ncols=4, **style.LEGEND_BELOW)
    text = (
        "Accuracy against time: left of the dotted line is faster than the fastest FP32\n"
        "Bars: 95 % intervals; simulated networks have no time; "
        "engines are named where there is room"
    )
    figure.suptitle(style.title(frame, text), fontsize=9)
    figure.draw_without_rendering()  # labels are placed once everything else has its place
    for axes, model in zip(panels[:, 0], models, strict=True):
        style.annotate(axes, named(frame[frame["model"] == model]))
    style.save(figure, args, "accuracy_vs_latency")


if __name__ == "__main__":
    script.run(make, __doc__)
