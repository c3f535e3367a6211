"""Throughput by batch size on all threads, for PTQ and QAT next to FP32.

python figures/throughput.py --study cats_and_dogs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from figures.shared.style import Line2D, plt
from utils import catalog
from utils.errors import UserError

QUANTIZING = [name for name, method in catalog.METHODS.items() if method.quantizes]


def curve(axes, run):
    """Draw a run's line, dashed by its engine, and return its legend entry."""
    row = run.iloc[0]
    dashes = "--" if row["method"] == "control" else catalog.BACKENDS[row["backend"]].dashes
    line = dict(color=style.colour(row), ls=dashes, lw=1.5)
    points = run.sort_values("batch_size")
    x, y = points["batch_size"].astype(int), points["throughput_ips"]
    axes.plot(x, y, path_effects=style.OUTLINE, **line)
    axes.plot(x, y, ls="", **style.look(row) | dict(ms=4.5))
    return Line2D([], [], label=row["series"], **line)


def draw(row, models, part):
    """Draw a method's row of panels, one per model, and its legend."""
    handles, names = {}, frames.labels(part)
    for axes, model in zip(row, models, strict=True):
        timed = part[part["model"] == model].dropna(subset="throughput_ips")
        for _, run in timed.groupby(frames.RUN, observed=True):
            handles[run["series"].iloc[0]] = curve(axes, run)
        missing = [f"{name}: not run" for name in names if name not in set(timed["series"])]
        axes.set_title("\n".join([catalog.MODELS[model].label, *missing]), fontsize=7.5)
    drawn = [handles[name] for name in names if name in handles]
    row[-1].legend(handles=drawn, **style.LEGEND_BESIDE)


def make(frame, args):
    frame = frame[(frame["threads"] == frame["threads"].max()) & ~frame["simulated"]]
    models = frames.present(frame)
    if not models:
        raise UserError(f"study {args.study} has no timed runs yet.")
    methods = [name for name in QUANTIZING if name in set(frame["method"])] or QUANTIZING[:1]
    size = dict(figsize=(1.8 + 2.2 * len(models), 1 + 2.2 * len(methods)), layout="constrained")
    shared = dict(sharex=True, sharey="col", squeeze=False)
    figure, panels = plt.subplots(len(methods), len(models), **shared, **size)
    for name, row in zip(methods, panels, strict=True):
        method = catalog.METHODS[name]
        draw(row, models, frame[frame["method"].isin((*method.compared_with, name))])
        row[0].set_ylabel(f"{method.label}: images/s (log scale)", fontsize=8)
    batches = sorted(frame["batch_size"].dropna().unique())
    for axes in panels.ravel():
        axes.set_xscale("log")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        style.log_scale(axes.yaxis)
    for axes in panels[-1]:
        axes.set_xlabel("Batch size (log scale)")
    text = "Throughput by batch size (simulated networks are not timed)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "throughput")


if __name__ == "__main__":
    script.run(make, __doc__)
