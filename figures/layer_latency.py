"""Time of a network by kind of operator and by number format, next to FP32.

    python figures/layer_latency.py --study cats_and_dogs

Shows the runs that were measured with --profile. The times are the engine's: measuring slows it
down, so a bar may be longer than the latency in results.csv.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from figures.shared.style import Patch, plt
from utils import catalog
from utils.errors import UserError

# By `kind` in a run's JSON. From dark to light, so that neighbours also differ in grey.
OPERATOR_COLOURS = {
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
INTEGER = "INT8"
OTHER_FORMATS = "////"  # their hatching


def profiled(frame, args):
    """List (row, profile) of each run that has a profile."""
    pairs = []
    for _, row in frame.iterrows():
        profile = runs.record(runs.path(args, row)).get("profile")
        if profile:
            pairs.append((row, profile))
    return pairs


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return bool(profiled(frames.one_batch(frame)[0], args))


def bars(pairs, model):
    """List (label, operators) of a model: each FP32 engine once, before the first run on it."""
    result, drawn = [], set()
    for row, profile in pairs:
        if row["model"] != model:
            continue
        engine = profile["fp32_backend"]
        if engine not in drawn:
            drawn.add(engine)
            result.append((f"FP32 {engine}", profile["fp32"]))
        if row["method"] != "fp32":
            result.append((row["series"], profile["operators"]))
    return result


def milliseconds(operators, kind):
    """Sum the time of a kind of operator in INT8, and in all other formats."""
    same = [operator for operator in operators if operator["kind"] == kind]
    integer = sum(operator["ms"] for operator in same if operator["format"] == INTEGER)
    other = sum(operator["ms"] for operator in same if operator["format"] != INTEGER)
    return integer, other


def bar(axes, place, operators):
    """Draw one network: a part per kind, plain in INT8 and hatched in other formats."""
    left = 0.0
    look = dict(ec="black", lw=0.5, height=0.7)
    for kind, colour in OPERATOR_COLOURS.items():
        for ms, hatch in zip(milliseconds(operators, kind), (None, OTHER_FORMATS), strict=True):
            if ms:
                axes.barh(place, ms, left=left, color=colour, hatch=hatch, **look)
                left += ms
    right = dict(xytext=(3, 0), textcoords="offset points", va="center")
    axes.annotate(f"{left:.3g}", (left, place), fontsize=7, **right)


def legend():
    """Legend entries for kinds of operators and for formats."""
    colours = {LABELS.get(kind, kind): colour for kind, colour in OPERATOR_COLOURS.items()}
    edge = dict(ec="black", lw=0.5)
    handles = [Patch(fc=colour, label=label, **edge) for label, colour in colours.items()]
    return [*handles, Patch(fc="white", hatch=OTHER_FORMATS, label=f"not in {INTEGER}", **edge)]


def make(frame, args):
    pairs = profiled(frames.one_batch(frame)[0], args)
    if not pairs:
        raise UserError(
            f"study {args.study} has no run with a profile yet; run scripts with --profile."
        )
    models = [model for model in frames.present(frame) if bars(pairs, model)]
    drawn = {model: bars(pairs, model) for model in models}
    heights = [len(drawn[model]) for model in models]
    height = 1.6 + 0.3 * sum(heights) + 0.35 * len(models)
    size = dict(figsize=(7.5, height), height_ratios=heights, layout="constrained")
    figure, panels = plt.subplots(len(models), 1, squeeze=False, **size)
    for axes, model in zip(panels[:, 0], models, strict=True):
        for place, (_, operators) in enumerate(drawn[model]):
            bar(axes, place, operators)
        axes.set(yticks=range(len(drawn[model])), ylim=(len(drawn[model]) - 0.5, -0.5))
        axes.set_yticklabels([label for label, _ in drawn[model]], fontsize=7.5)
        axes.set_title(catalog.MODELS[model].label, fontsize=9)
        axes.margins(x=0.08)
        axes.grid(False, axis="y")
    panels[-1, 0].set_xlabel("milliseconds per batch")
    figure.legend(handles=legend(), ncols=5, fontsize=7, **style.LEGEND_BELOW)
    first = pairs[0][1]
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    text = f"Time of operators, as the engine reports it; batch {first['batch_size']}, {threads}"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args, "layer_latency")


if __name__ == "__main__":
    script.run(make, __doc__)
