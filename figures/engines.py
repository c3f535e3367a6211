"""Every FP32 engine beside INT8 on every engine, in milliseconds of one comparison.

    python figures/engines.py --study cats_and_dogs

The FP32 engines were timed in turns, for the search of the fastest one. An INT8 network was timed in
turns with that one later, when the machine may have been busier. So it is placed by its speed-up: the
fastest FP32's time in the search, divided by how many times faster INT8 was in the same rounds.
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from utils.errors import UserError

MARKS = style.Dots("ms", "ms_ci")
TIMES = {
    "ms": "",
    "ms_ci_low": "_ci_high",
    "ms_ci_high": "_ci_low",
}  # a higher speed-up is a shorter time


def searched(row: pd.Series, args) -> dict[str, float]:
    """Milliseconds of each FP32 engine, by its name, in the search of a timed FP32 run."""
    path = runs.path(args, row)
    for timing in runs.record(path, "timing")["timing"]:
        if (timing["threads"], timing["batch_size"]) == (row["threads"], row["batch_size"]):
            return timing.get("fp32_ms") or {}
    return {}


def placed(frame: pd.DataFrame, args) -> pd.DataFrame:
    """Return a row with `ms` for each FP32 engine and each INT8 run of every model whose search is known."""
    one = frame.dropna(subset="latency_ms_p50")
    rows = []
    for _, baseline in one[one["method"] == "fp32"].iterrows():
        engines = searched(baseline, args)
        for engine, ms in sorted(engines.items(), key=lambda item: item[1]):
            rows.append(
                dict(baseline)
                | dict.fromkeys(TIMES, ms)
                | {"series": f"FP32 {engine}", "contended": False}
            )
        same = (
            (one["model"] == baseline["model"])
            & (one["dtype"] == "int8")
            & (one["device"] == baseline["device"])
        )
        for _, row in one[same & one["best_fp32"].isin(list(engines))].iterrows():
            fastest = engines[row["best_fp32"]]
            rows.append(
                dict(row)
                | {name: fastest / row[f"speedup_vs_best_fp32{end}"] for name, end in TIMES.items()}
            )
    return pd.DataFrame(rows)


def applies(frame, args) -> bool:
    """Whether the fastest FP32 of any model was searched."""
    return not placed(frames.one_batch(frame)[0], args).empty


def make(frame, args):
    frame, batch = frames.one_batch(frame)
    rows = placed(frame, args)
    if rows.empty:
        raise UserError(
            f"study {args.study} has no search of the fastest FP32; time an FP32 run without --smoke."
        )
    names = list(
        dict.fromkeys([*rows.loc[rows["dtype"] == "fp32", "series"], *frames.labels(rows)])
    )
    figure, panels = style.panels(rows, names, width=2.4)
    for axes, _, runs_of_model in panels:
        style.gaps(axes, runs_of_model, names, MARKS)
        style.dots(axes, runs_of_model, names, MARKS)
        axes.axvline(
            runs_of_model.loc[runs_of_model["method"] == "fp32", "ms"].min(),
            color="black",
            lw=0.8,
            ls=":",
            zorder=1,
        )
        style.log_scale(axes.xaxis)
        axes.set_xlabel(f"ms at batch {batch} (log scale)")
    text = "Time of every FP32 engine, and of INT8 by its speed-up over the fastest of them\n"
    text += f"(dotted: the fastest FP32; bars: 95 % intervals{style.contended(rows)})"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "engines")


if __name__ == "__main__":
    script.run(make, __doc__)
