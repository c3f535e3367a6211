"""Where the time of a network goes, by kind of operator and format, with FP32 beside it.

    python figures/layer_latency.py --study cats_and_dogs

Shows the runs that were measured with --profile. Times are the engine's: measuring slows it down, so
a bar may be longer than the latency in results.csv.
"""

import sys
from pathlib import Path

from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from figures.shared.style import plt
from utils import catalog
from utils.errors import UserError

# From dark to light, so that neighbours differ in grey, too; as `kind` in a run's JSON.
KINDS = {
    "convolution": "#08306b",
    "depthwise": "#2b7bba",
    "linear": "#7fb8da",
    "normalisation": "#d5e5f4",
    "pooling": "#7f2704",
    "activation": "#d9590f",
    "sum or product": "#fd9a4e",
    "reorder": "#fdd7af",
    "other": "#f2f2f2",
}
LABELS = {"reorder": "change of format or order"}
INTEGER = "INT8"  # the other formats are hatched


def profiled(frame, args):
    """List (row, profile) of each run that has one."""
    stored = (
        (row, runs.record(runs.path(args, row)).get("profile")) for _, row in frame.iterrows()
    )
    return [(row, profile) for row, profile in stored if profile]


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return bool(profiled(frames.one_batch(frame)[0], args))


def bars(rows):
    """List (label, operators) of one model: each FP32 engine once, before the first run on it."""
    result, drawn = [], set()
    for row, profile in rows:
        if profile["fp32_backend"] not in drawn:
            drawn.add(profile["fp32_backend"])
            result.append((f"FP32 {profile['fp32_backend']}", profile["fp32"]))
        if row["method"] != "fp32":
            result.append((row["series"], profile["operators"]))
    return result


def bar(axes, place, operators):
    """Draw one network: a part for each kind, that in INT8 plain and the rest hatched."""
    left = 0.0
    for kind, colour in KINDS.items():
        for integer in (True, False):
            ms = sum(
                each["ms"]
                for each in operators
                if each["kind"] == kind and (each["format"] == INTEGER) == integer
            )
            if ms:
                axes.barh(
                    place,
                    ms,
                    left=left,
                    color=colour,
                    ec="black",
                    lw=0.5,
                    hatch=None if integer else "////",
                    height=0.7,
                )
                left += ms
    axes.annotate(
        f"{left:.3g}", (left, place), (3, 0), textcoords="offset points", va="center", fontsize=7
    )


def make(frame, args):
    rows = profiled(frames.one_batch(frame)[0], args)
    if not rows:
        raise UserError(
            f"study {args.study} has no run with a profile yet; run scripts with --profile."
        )
    models = [
        model for model in frames.present(frame) if any(row["model"] == model for row, _ in rows)
    ]
    drawn = {model: bars([each for each in rows if each[0]["model"] == model]) for model in models}
    heights = [len(drawn[model]) for model in models]
    size = dict(
        figsize=(7.5, 1.6 + 0.3 * sum(heights) + 0.35 * len(models)),
        height_ratios=heights,
        layout="constrained",
    )
    figure, panels = plt.subplots(len(models), 1, squeeze=False, **size)
    for axes, model in zip(panels[:, 0], models, strict=True):
        for place, (_, operators) in enumerate(drawn[model]):
            bar(axes, place, operators)
        axes.set(yticks=range(len(drawn[model])), ylim=(len(drawn[model]) - 0.5, -0.5))
        axes.set_yticklabels([label for label, _ in drawn[model]], fontsize=7.5)
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
        axes.margins(x=0.08)
        axes.grid(False, axis="y")
    panels[-1, 0].set_xlabel("milliseconds for a batch")
    handles = [
        Patch(fc=colour, ec="black", lw=0.5, label=LABELS.get(kind, kind))
        for kind, colour in KINDS.items()
    ]
    handles.append(Patch(fc="white", ec="black", lw=0.5, hatch="////", label=f"not in {INTEGER}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    first = rows[0][1]
    threads, batch = first["threads"], first["batch_size"]
    text = f"Time of operators, as the engine reports it; batch {batch}, {threads} thread{'s' * (threads > 1)}"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "layer_latency")


if __name__ == "__main__":
    script.run(make, __doc__)
