"""Signal-to-quantization-noise ratio of every layer: where a network loses its accuracy.

python figures/layer_sqnr.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from figures.shared.style import Line2D, plt
from utils import catalog
from utils.errors import UserError

SIDES = {
    "weight_sqnr_db": "Weights",
    "output_sqnr_db": "Outputs, including errors of earlier layers",
}
LABELS = 26  # names of layers that fit below a panel
TOP = 110  # dB; 16 bits reach about 100, and more is FP32 summed in another order
TOP_RIGHT = dict(x=0.99, y=0.97, va="top")  # of a panel


def curve(axes, run, values):
    """Draw the layers of one network and return its legend entry.

    Each panel names its model, so markers can distinguish number formats where lines cross. The
    methods of INT8 nearly coincide, so one is a ring around the dot of the other.
    """
    colour, filled, dtype = style.colour(run), style.filled(run), catalog.FORMATS[run["dtype"]]
    mark = dict(marker=dtype.shape, mec="black", mew=0.7)
    if filled:
        mark |= dict(ms=3, mfc=colour)
    else:
        mark |= dict(ms=6 if len(values) < 30 else 4.5, mfc="none")
    line = dict(color=colour, ls=dtype.dashes, lw=1.6 if filled else 0.9)
    axes.plot(values, path_effects=style.OUTLINE if filled else None, **line)
    axes.plot(values, ls="", **mark)
    return Line2D([], [], label=run["series"], **line, **mark)


def name_layers(axes, names):
    """Write the names of layers below a panel; only some of many, so that they are readable."""
    every = -(-len(names) // LABELS)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=5.5)
    axes.set_xticks(range(len(names)), minor=True)


def with_layers(frame, args):
    """Select one row per run whose layers were compared with FP32, and add the layers.

    Some engines do not expose their layers.
    """
    one, _ = frames.one_batch(frame)
    layers = [runs.record(runs.path(args, run), "layers")["layers"] for _, run in one.iterrows()]
    one = one.assign(layers=pd.Series(layers, one.index, dtype=object))
    return one[one["layers"].astype(bool)]


def draw(row, part):
    """Draw the networks of a model in its row of panels; return legend entries by series."""
    handles = {}
    for _, run in part.iterrows():
        for axes, side in zip(row, SIDES, strict=True):
            values = [layer[side] for layer in run["layers"]]
            values = [float("nan") if value is None else value for value in values]
            handles[run["series"]] = curve(axes, run, values)
            name_layers(axes, [layer["layer"] for layer in run["layers"]])
            axes.set_title(f"{catalog.MODELS[run['model']].label}: {SIDES[side]}", fontsize=8)
    row[0].set_ylabel("SQNR (dB)")
    row[0].set_ylim(top=min(row[0].get_ylim()[1], TOP))
    return handles


def make(frame, args):
    compared = with_layers(frames.quantized(frame), args)
    if compared.empty:
        raise UserError(f"study {args.study} has no quantized runs whose layers were compared yet.")
    frame = frames.usual(compared).sort_values(["dtype", "method"], kind="stable")
    models = frames.present(frame)
    size = dict(figsize=(7.5, 1.2 + 2.3 * len(models)), layout="constrained")
    figure, panels = plt.subplots(len(models), 2, squeeze=False, sharey="row", **size)
    handles = {}
    for row, model in zip(panels, models, strict=True):
        part = frame[frame["model"] == model]
        handles |= draw(row, part)
        style.missing(row[1], frame["series"].unique(), part, TOP_RIGHT)
    look = dict(fontsize=7, ncols=3, handlelength=4)
    figure.legend(handles=list(handles.values()), **look, **style.LEGEND_BELOW)
    study = frame.iloc[0]["study"].replace("_", " ")
    text = (
        f"Signal-to-quantization-noise ratio (SQNR) by layer on validation images ({study})\n"
        "Gaps and values at the top edge: almost no rounding error"
    )
    figure.suptitle(text, fontsize=9)
    style.save(figure, args, "layer_sqnr")


if __name__ == "__main__":
    script.run(make, __doc__)
