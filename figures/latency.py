"""Latency with its 95 % interval, at the smallest batch size on all threads.

python figures/latency.py --study cats_and_dogs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style

MARKS = style.Dots("latency_ms_p50", "latency_ms_ci")


def make(frame, args):
    frame, batch = frames.one_batch(frame)
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, _, runs in panels:
        style.gaps(axes, runs, rows, MARKS)
        style.dots(axes, runs, rows, MARKS)
        style.baseline(axes, runs, MARKS)
        style.log_scale(axes.xaxis)
        axes.set_xlabel(f"ms at batch {batch} (log scale)")
    text = f"Latency: median and its 95 % interval (dotted: eager FP32{style.contended(frame)})"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "latency")


if __name__ == "__main__":
    script.run(make, __doc__)
