"""Images a second against batch size on all threads: PTQ above, QAT below, each beside FP32.

python figures/throughput.py --study cats_and_dogs
"""

import style
from matplotlib.lines import Line2D
from style import plt

KINDS = {"ptq": ("fp32", "ptq"), "qat": ("fp32", "control", "qat")}  # methods drawn in a row of panels


def curve(axes, run):
    """Draw a run's line and return its part of the legend; the dash pattern is the engine, or the control."""
    row = run.iloc[0]
    line = dict(color=style.COLOUR[row["dtype"]], ls="--" if row["method"] == "control" else style.DASHES[row["backend"]], lw=1.5)
    points = run.sort_values("batch_size")
    axes.plot(points["batch_size"].astype(int), points["throughput_ips"], path_effects=style.OUTLINE, **line)
    axes.plot(points["batch_size"].astype(int), points["throughput_ips"], ls="", **style.look(row) | dict(ms=4.5))
    return Line2D([], [], label=row["series"], **line)


def main():
    frame, args = style.load(__doc__)
    frame = frame[(frame["threads"] == frame["threads"].max()) & ~frame["simulated"]]
    models, kinds = style.present(frame), [kind for kind in KINDS if kind in set(frame["method"])] or ["ptq"]
    if not models:
        raise SystemExit(f"error: study {args.study} has no timed runs yet.")
    size = dict(figsize=(1.8 + 2.2 * len(models), 1 + 2.2 * len(kinds)), sharex=True, sharey="col", squeeze=False)
    figure, panels = plt.subplots(len(kinds), len(models), layout="constrained", **size)
    for kind, row in zip(kinds, panels, strict=True):
        part = frame[frame["method"].isin(KINDS[kind])]
        handles = {}
        for axes, model in zip(row, models, strict=True):
            own = part[part["model"] == model]
            timed = own.dropna(subset="throughput_ips")
            handles |= {run["series"].iloc[0]: curve(axes, run) for _, run in timed.groupby(style.RUN, observed=True)}
            lacking = [name for name in style.labels(part) if name not in set(timed["series"])]
            axes.set_title("\n".join([style.MODELS[model], *(f"{name}: not run" for name in lacking)]), fontsize=7.5)
        row[0].set_ylabel(f"{style.METHODS[kind]}: images/s (log scale)", fontsize=8)
        row[-1].legend(handles=[handles[name] for name in style.labels(part) if name in handles], **style.BESIDE)
    batches = sorted(frame["batch_size"].dropna().unique())
    for axes in panels.ravel():
        axes.set_xscale("log")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        style.log_scale(axes.yaxis)
    for axes in panels[-1]:
        axes.set_xlabel("Batch size (log scale)")
    figure.suptitle(style.title(frame, "Throughput by batch size (simulated networks are not timed)"), fontsize=9)
    style.save(figure, args.out, "throughput")


if __name__ == "__main__":
    main()
