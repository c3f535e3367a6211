"""Accuracy against latency at the smallest batch size, with the Pareto front of all models.

python figures/accuracy_vs_latency.py --study cats_and_dogs
"""

import sys
from pathlib import Path

from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from figures.shared.style import plt
from utils import catalog
from utils.errors import UserError


def front(frame):
    """Select the runs that no other run beats in both latency and accuracy, fastest first."""
    ordered = frame.sort_values(["latency_ms_p50", "accuracy"], ascending=[True, False], kind="stable")
    return ordered[ordered["accuracy"] > ordered["accuracy"].cummax().shift(fill_value=-1)]


def draw(axes, runs):
    """Draw a model's runs with their intervals in both directions."""
    for _, row in runs.iterrows():
        x, y = row["latency_ms_p50"], 100 * row["accuracy"]
        xerr = [[max(0, x - row["latency_ms_ci_low"])], [max(0, row["latency_ms_ci_high"] - x)]]
        yerr = [[y - 100 * row["accuracy_ci_low"]], [100 * row["accuracy_ci_high"] - y]]
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, ecolor="0.75", elinewidth=0.7)
        axes.plot(x, y, ls="", zorder=3, **style.look(row))


def legend(frame):
    """Legend entries for colours, filled and hollow marks, and the front."""
    handles = [Line2D([], [], ls="", marker="D", mfc=dtype.colour, mec="black", label=dtype.label)
               for name, dtype in catalog.FORMATS.items() if name in set(frame["dtype"])]  # fmt: skip
    fills = {f"filled: {style.methods(filled=True)}, FP32": "0.7", f"hollow: {style.methods(filled=False)}": "white"}
    handles += [Line2D([], [], ls="", marker="D", mfc=fill, mec="black", label=text) for text, fill in fills.items()]
    return [*handles, Line2D([], [], color="black", lw=1, ls="--", label="Pareto front of all models")]


def make(frame, args):
    frame, batch = frames.one_batch(frame)
    frame = frame.dropna(subset="latency_ms_p50")
    models = frames.present(frame)
    if not models:
        raise UserError(f"study {args.study} has no timed runs yet.")
    size = dict(figsize=(7.2, 1.3 + 1.8 * len(models)), sharex=True, sharey=True, squeeze=False, layout="constrained")
    figure, panels = plt.subplots(len(models), 1, **size)
    best = front(frame)
    for axes, model in zip(panels[:, 0], models, strict=True):
        runs = frame[frame["model"] == model]
        draw(axes, runs)
        axes.step(best["latency_ms_p50"], 100 * best["accuracy"], where="post", color="black", lw=1, ls="--", zorder=2)
        missing = [name for name in frames.labels(frame) if name not in set(runs["series"])]
        text = "not run: " + ", ".join(missing) if missing else ""
        axes.text(0.99, 0.03, text, transform=axes.transAxes, ha="right", fontsize=6, color="0.4")
        axes.set_ylabel(f"{catalog.MODELS[model].label}\nTest accuracy (%)", fontsize=8)
    axes.margins(0.06, 0.1)
    style.log_scale(axes.xaxis)
    axes.set_xlabel(f"Latency at batch {batch}, median (ms, log scale)")
    figure.legend(handles=legend(frame), fontsize=7, loc="outside lower center", ncols=7, frameon=False)
    text = "Accuracy against latency (bars: 95 % intervals; simulated networks have no latency)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    figure.draw_without_rendering()  # labels are placed when everything else has its place
    for axes, model in zip(panels[:, 0], models, strict=True):
        runs = frame[(frame["model"] == model) & (frame["method"] != "fp32")]  # the baseline's colour is black
        names = runs["backend"].where(runs["method"] != "control", "control")
        style.annotate(axes, zip(runs["latency_ms_p50"], 100 * runs["accuracy"], names, strict=True))
    style.save(figure, args, "accuracy_vs_latency")


if __name__ == "__main__":
    script.run(make, __doc__)
