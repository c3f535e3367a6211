"""What the method costs beside what the engine adds: SQNR of both, by engine.

    python figures/method_vs_engine.py --study cats_and_dogs

The method's network is computed in exact arithmetic, and compared with FP32; the engine's answers are
compared with that network's. Where the engine's SQNR is the lower one, the engine decides the error.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, script, style
from utils.errors import UserError

METHOD = style.Dots("sqnr_reference_db", shift=-0.18)
ENGINE = style.Dots("engine_db", shift=0.18, look=dict(ms=4))
EQUAL = 100  # dB, at which an engine is drawn that adds nothing, or less than this


def judged(frame):
    """Select the runs whose method was computed in exact arithmetic, and add `engine_db`, EQUAL at most."""
    frame = frames.one_batch(frame)[0].dropna(subset="sqnr_reference_db")
    return frame.assign(engine_db=frame["sqnr_vs_reference_db"].fillna(np.inf).clip(upper=EQUAL))


def applies(frame, args) -> bool:
    """Whether any run has both errors."""
    return not judged(frame).empty


def make(frame, args):
    frame = judged(frame)
    if frame.empty:
        raise UserError(
            f"study {args.study} has no run whose method was computed in exact arithmetic; run its INT8 scripts."
        )
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows, width=2.4)
    for axes, _, runs in panels:
        style.gaps(axes, runs, rows, style.Dots("sqnr_reference_db"))
        for marks in (METHOD, ENGINE):
            style.dots(axes, runs, rows, marks)
        axes.set_xlabel("SQNR (dB); right is better")
    names = {
        7: "the method, from FP32",
        4: f"the engine, from the method ({EQUAL} dB: as good as nothing)",
    }
    style.sizes(figure, names)
    text = "Error of the method beside that of the engine: the one further left decides"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "method_vs_engine")


if __name__ == "__main__":
    script.run(make, __doc__)
