"""Signal-to-quantization-noise ratio of every layer: where a network loses its accuracy.

python figures/layer_sqnr.py --study cats_and_dogs
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from figures.shared.style import plt
from utils import catalog
from utils.errors import UserError

SIDES = {
    "weight_sqnr_db": "Weights",
    "output_sqnr_db": "Outputs, including errors of earlier layers",
}
LABELS = 26  # names of layers below a panel
TOP = 110  # dB; 16 bits reach about 100, more is FP32 summed in another order


def curve(axes, run, values):
    """Draw one network's layers and return its legend entry.

    Each panel names its model, so markers can tell number formats apart where lines cross. The
    methods of INT8 nearly coincide, so one is a ring around the other's dot.
    """
    colour, filled, dtype = style.colour(run), style.filled(run), catalog.FORMATS[run["dtype"]]
    ring = 6 if len(values) < 30 else 4.5
    mark = dict(
        marker=dtype.shape,
        ms=3 if filled else ring,
        mfc=colour if filled else "none",
        mec="black",
        mew=0.7,
    )
    line = dict(color=colour, ls=dtype.dashes, lw=1.6 if filled else 0.9)
    axes.plot(values, path_effects=style.OUTLINE if filled else None, **line)
    axes.plot(values, ls="", **mark)
    return Line2D([], [], label=run["series"], **line, **mark)


def name_layers(axes, names):
    """Write the names of layers below a panel, of many only some, so that they can be read."""
    every = -(-len(names) // LABELS)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=5.5)
    axes.set_xticks(range(len(names)), minor=True)


def with_layers(frame, args):
    """Select one row for each run whose layers were compared with FP32, and add them; some engines do not expose theirs."""
    one, _ = frames.one_batch(frame)
    layers = [runs.record(runs.path(args, run), "layers")["layers"] for _, run in one.iterrows()]
    one = one.assign(layers=pd.Series(layers, one.index, dtype=object))
    return one[one["layers"].astype(bool)]


def make(frame, args):
    compared = with_layers(frames.quantized(frame), args)
    if compared.empty:
        raise UserError(f"study {args.study} has no quantized runs whose layers were compared yet.")
    frame = frames.usual(compared).sort_values(["dtype", "method"], kind="stable")
    models = frames.present(frame)
    size, handles = (7.5, 1.2 + 2.3 * len(models)), {}
    figure, panels = plt.subplots(
        len(models), 2, figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for row, model in zip(panels, models, strict=True):
        part = frame[frame["model"] == model]
        for _, run in part.iterrows():
            layers = run["layers"]
            for axes, side in zip(row, SIDES, strict=True):
                values = [float("nan") if layer[side] is None else layer[side] for layer in layers]
                handles[run["series"]] = curve(axes, run, values)
                name_layers(axes, [layer["layer"] for layer in layers])
                axes.set_title(f"{catalog.MODELS[model].label}: {SIDES[side]}", fontsize=8)
        missing = [name for name in frame["series"].unique() if name not in set(part["series"])]
        text = "not run: " + ", ".join(missing) if missing else ""
        row[1].text(
            0.99,
            0.97,
            text,
            transform=row[1].transAxes,
            ha="right",
            va="top",
            fontsize=6,
            color="0.4",
        )
        row[0].set_ylabel("SQNR (dB)")
        row[0].set_ylim(top=min(row[0].get_ylim()[1], TOP))
    figure.legend(
        handles=list(handles.values()),
        fontsize=7,
        loc="outside lower center",
        ncols=3,
        handlelength=4,
        frameon=False,
    )
    study = frame.iloc[0]["study"].replace("_", " ")
    text = f"Signal-to-quantization-noise ratio (SQNR) by layer on validation images ({study})\n"
    figure.suptitle(text + "Gaps and values at the top edge: almost no rounding error", fontsize=9)
    style.save(figure, args, "layer_sqnr")


if __name__ == "__main__":
    script.run(make, __doc__)
