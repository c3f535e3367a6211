"""Error of the method next to the error of the engine: SQNR of both, by engine.

    python figures/method_vs_engine.py --study cats_and_dogs

The method's network is executed on exact integers and compared with FP32; the engine's answers are
compared with the exact ones. If the engine's SQNR is the lower one, the engine dominates the error.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from utils.errors import UserError

METHOD = style.Dots("sqnr_reference_db", shift=-0.18)
ENGINE = style.Dots("engine_db", shift=0.18, look=dict(ms=4))
EQUAL = 100  # dB; place of an engine that adds nothing, or less error than this


def judged(frame):
    """Select the runs with an exact execution, and add `engine_db`, at most EQUAL."""
    frame = frames.one_batch(frame)[0].dropna(subset="sqnr_reference_db")
    return frame.assign(engine_db=frame["sqnr_vs_reference_db"].fillna(np.inf).clip(upper=EQUAL))


def applies(frame, args) -> bool:
    """Whether a run has both errors."""
    return not judged(frame).empty


def make(frame, args):
    frame = judged(frame)
    if frame.empty:
        raise UserError(
            f"study {args.study} has no run whose network was executed on exact integers; run its "
            "INT8 scripts."
        )
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows, width=2.4)
    for axes, _, runs in panels:
        style.gaps(axes, runs, rows, style.Dots("sqnr_reference_db"))
        for marks in (METHOD, ENGINE):
            style.dots(axes, runs, rows, marks)
        axes.set_xlabel("SQNR (dB); right is better")
    names = {
        7: "the method, against FP32",
        4: f"the engine, against the method ({EQUAL} dB: practically no error)",
    }
    style.sizes(figure, names)
    text = "Error of the method and error of the engine: the one further left dominates"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "method_vs_engine")


if __name__ == "__main__":
    script.run(make, __doc__)
