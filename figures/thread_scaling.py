"""Latency on one thread and on all threads at the smallest batch size, and their ratio.

python figures/thread_scaling.py --study cats_and_dogs
"""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style

MARKS = style.Dots("latency_ms_p50", "latency_ms_ci")
SMALL = replace(MARKS, look=dict(ms=4))


def connect(axes, both, rows):
    """Draw a line between the times on one thread and on all, next to their ratio.

    A star after the ratio stands for both marks, which are too close for a star each.
    """
    for _, row in both.dropna(subset=["latency_ms_p50", "latency_ms_p50_one"]).iterrows():
        ends, place = [row["latency_ms_p50"], row["latency_ms_p50_one"]], rows.index(row["series"])
        axes.plot(ends, [place, place], color="0.4", lw=1, zorder=2)
        contended = [row[name] for name in ("contended", "contended_one")]
        star = "*" if any(pd.notna(value) and value for value in contended) else ""
        right = dict(xytext=(11, 0), textcoords="offset points", va="center")
        axes.annotate(f"{ends[1] / ends[0]:.1f}x{star}", (max(ends), place), fontsize=6, **right)


def thread_names(few, many):
    """Explain the sizes of the marks: size in points -> number of threads."""
    if few == many:
        return {7: f"{many} threads only"}
    return {7: f"{many} threads", 4: "1 thread" if few == 1 else f"{few} threads"}


def make(frame, args):
    few, many = frame["threads"].min(), frame["threads"].max()
    every, batch = frames.one_batch(frame)
    one, _ = frames.one_batch(frame[frame["threads"] == few])
    star = style.contended(pd.concat([every, one]))
    times = one[[*frames.RUN, "latency_ms_p50", "contended"]]
    both = every.merge(times, on=frames.RUN, how="left", suffixes=("", "_one"))
    rows = frames.labels(every)
    figure, panels = style.panels(every, rows)
    for axes, model, runs in panels:
        style.gaps(axes, runs, rows, MARKS)
        if few == many:
            style.dots(axes, runs, rows, MARKS)
        else:
            connect(axes, both[both["model"] == model], rows)
            for part, marks in ((one[one["model"] == model], SMALL), (runs, MARKS)):
                style.dots(axes, part.assign(contended=False), rows, marks)
        axes.set_xscale("log")
        axes.margins(x=0.1)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.2)  # room for the ratio
        style.log_scale(axes.xaxis)
        axes.set_xlabel(f"ms at batch {batch} (log scale)")
    style.sizes(figure, thread_names(few, many))
    text = f"Latency by number of threads (medians with 95 % intervals{star})"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "thread_scaling")


if __name__ == "__main__":
    script.run(make, __doc__)
