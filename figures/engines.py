"""Every FP32 engine next to INT8 on every engine, in milliseconds of one comparison.

    python figures/engines.py --study cats_and_dogs

The FP32 engines took turns in the search for the fastest one. Each INT8 network took turns with
that engine later, when the machine may have been busier. So INT8 is placed by its speed-up: the
fastest FP32's time in the search, divided by how many times faster INT8 was in the same rounds.
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from utils.errors import UserError

MARKS = style.Dots("ms", "ms_ci")
# Columns and the speed-up that each comes from; a higher speed-up is a shorter time.
TIMES = {"ms": "", "ms_ci_low": "_ci_high", "ms_ci_high": "_ci_low"}


def searched(row: pd.Series, args) -> dict[str, float]:
    """Milliseconds of each FP32 engine, by name, in the search of a timed FP32 run."""
    path = runs.path(args, row)
    for timing in runs.record(path, "timing")["timing"]:
        if (timing["threads"], timing["batch_size"]) == (row["threads"], row["batch_size"]):
            return timing.get("fp32_ms") or {}
    return {}


def placed(frame: pd.DataFrame, args) -> pd.DataFrame:
    """Return rows with `ms` for the FP32 engines and INT8 runs of models with a known search."""
    one = frame.dropna(subset="latency_ms_p50")
    rows = []
    for _, baseline in one[one["method"] == "fp32"].iterrows():
        engines = searched(baseline, args)
        for engine, ms in sorted(engines.items(), key=lambda item: item[1]):
            changes = {"series": f"FP32 {engine}", "contended": False}
            rows.append(dict(baseline) | dict.fromkeys(TIMES, ms) | changes)
        int8 = one[one["dtype"] == "int8"]
        for column in ("model", "device"):
            int8 = int8[int8[column] == baseline[column]]
        for _, row in int8[int8["best_fp32"].isin(list(engines))].iterrows():
            fastest = engines[row["best_fp32"]]
            times = {
                name: fastest / row[f"speedup_vs_best_fp32{end}"] for name, end in TIMES.items()
            }
            rows.append(dict(row) | times)
    return pd.DataFrame(rows)


def applies(frame, args) -> bool:
    """Whether the fastest FP32 of a model was searched."""
    return not placed(frames.one_batch(frame)[0], args).empty


def make(frame, args):
    frame, batch = frames.one_batch(frame)
    rows = placed(frame, args)
    if rows.empty:
        raise UserError(
            f"study {args.study} has no search of the fastest FP32; time an FP32 run without "
            "--smoke."
        )
    fp32 = rows.loc[rows["dtype"] == "fp32", "series"]
    names = list(dict.fromkeys([*fp32, *frames.labels(rows)]))
    figure, panels = style.panels(rows, names, width=2.4)
    for axes, _, part in panels:
        style.gaps(axes, part, names, MARKS)
        style.dots(axes, part, names, MARKS)
        fastest = part.loc[part["method"] == "fp32", "ms"].min()
        axes.axvline(fastest, color="black", lw=0.8, ls=":", zorder=1)
        style.log_scale(axes.xaxis)
        axes.set_xlabel(f"ms at batch {batch} (log scale)")
    text = (
        "Time of every FP32 engine, and of INT8 by its speed-up over the fastest of them\n"
        f"(dotted: the fastest FP32; bars: 95 % intervals{style.contended(rows)})"
    )
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "engines")


if __name__ == "__main__":
    script.run(make, __doc__)
