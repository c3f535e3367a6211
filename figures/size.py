"""Size of the deployed file, next to the size of its weights and biases alone.

python figures/size.py --study cats_and_dogs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style

FILE = style.Dots("size_mb")
LINE = dict(marker="|", ms=15, mew=1.2, path_effects=None, markeredgecolor="0.3")
WEIGHTS = style.Dots("theoretical_mb", look=LINE)


def make(frame, args):
    frame, _ = frames.one_batch(frame)
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, _, runs in panels:
        style.gaps(axes, runs, rows, FILE)
        style.dots(axes, runs, rows, FILE)
        style.dots(axes, runs, rows, WEIGHTS)
        axes.set_xlim(left=0)
        axes.set_xlabel("Size (MiB)")
    text = "Size of the deployed file (vertical line: computed size of its weights alone)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "size")


if __name__ == "__main__":
    script.run(make, __doc__)
