"""Speed-up of every variant over eager FP32 and over the machine's fastest FP32.

python figures/speedup.py --study cats_and_dogs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from utils import catalog

EAGER = style.Dots("speedup_vs_eager_fp32", "speedup_vs_eager_fp32_ci", shift=-0.2, look=dict(ms=7))
BEST = style.Dots("speedup_vs_best_fp32", "speedup_vs_best_fp32_ci", shift=0.2, look=dict(ms=4))
MISSING = style.Dots("speedup_vs_eager_fp32")


def make(frame, args):
    frame, batch = frames.one_batch(frame)
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, model, runs in panels:
        style.gaps(axes, runs, rows, MISSING)
        for marks in (EAGER, BEST):
            style.dots(axes, runs, rows, marks)
        axes.axvline(1, color="black", lw=1.2, ls="--", zorder=1)
        style.log_scale(axes.xaxis)
        fastest = " or ".join(sorted(set(runs["best_fp32"].dropna()))) or "not timed"
        axes.set_title(f"{catalog.MODELS[model].label}\nfastest FP32:\n{fastest}", fontsize=8)
        axes.set_xlabel("Speed-up (log scale)")
    names = {EAGER.look["ms"]: "over eager FP32", BEST.look["ms"]: "over the fastest FP32"}
    style.sizes(figure, names)
    text = (
        f"Speed-up at batch {batch} and its 95 % interval "
        f"(dashed: no change{style.contended(frame)}{style.converted(frame)})"
    )
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "speedup")


if __name__ == "__main__":
    script.run(make, __doc__)
