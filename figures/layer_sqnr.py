"""Signal-to-quantization-noise ratio of every layer's weights and outputs: where a network loses its accuracy.

python figures/layer_sqnr.py --study cats_and_dogs
"""

import style
from matplotlib.lines import Line2D
from style import plt

from utils import cli, results

SIDES = {"weight_sqnr_db": "Weights", "output_sqnr_db": "Outputs, errors of earlier layers included"}
# Here the panel names the model, so that markers can tell formats apart where lines cross; INT8's methods nearly coincide, so
# QAT is a ring around PTQ's dot.
SHAPE = {"fp16": "v", "int16": "D", "int8": "o"}
DASHES = {"fp16": (0, (5, 1.5)), "int16": (0, (1, 1)), "int8": "-"}
TOP = 110  # dB; 16 bits reach about 100, more is FP32 summed in another order


def chosen(frame):
    """One run for each model, method and number format: its first engine, its lowest seed."""
    rank = {(*kind, backend): n for kind, own in cli.BACKENDS.items() for n, backend in enumerate(own)}
    frame = frame[frame["method"].isin(("ptq", "qat"))]
    order = [rank[key] for key in zip(frame["method"], frame["dtype"], frame["backend"], strict=True)]
    frame = frame.assign(rank=order).sort_values(["rank", "seed"], kind="stable")
    return frame.drop_duplicates(["model", "method", "dtype"]).sort_values(["dtype", "method"], kind="stable")


def curve(axes, run, values):
    """Draw one network's layers and return its part of the legend."""
    colour = style.COLOUR[run["dtype"]]
    qat = run["method"] == "qat"
    mark = dict(
        marker=SHAPE[run["dtype"]],
        ms=(6 if len(values) < 30 else 4.5) if qat else 3,
        mfc="none" if qat else colour,
        mec="black",
        mew=0.7,
    )
    line = dict(color=colour, ls=DASHES[run["dtype"]], lw=0.9 if qat else 1.6)
    axes.plot(values, path_effects=style.OUTLINE if not qat else None, **line)
    axes.plot(values, ls="", **mark)
    return Line2D([], [], label=run["series"], **line, **mark)


def main():
    frame, args = style.load(__doc__)
    frame = chosen(frame)
    models = style.present(frame)
    if not models:
        raise SystemExit(f"error: study {args.study} has no quantized runs yet.")
    size = (9, 0.9 + 2.3 * len(models))
    figure, panels = plt.subplots(len(models), 2, figsize=size, squeeze=False, sharey="row", layout="constrained")
    for row, model in zip(panels, models, strict=True):
        own, handles = frame[frame["model"] == model], []
        for _, run in own.iterrows():
            layers = results.read(style.record(args, run))["layers"]
            for axes, side in zip(row, SIDES, strict=True):
                drawn = curve(axes, run, [float("nan") if layer[side] is None else layer[side] for layer in layers])
                axes.set_xticks(range(len(layers)), [layer["layer"] for layer in layers], rotation=90, fontsize=4.5)
                axes.set_title(f"{style.MODELS[model]}: {SIDES[side]}", fontsize=8)
            handles.append(drawn)
        have = set(zip(own["method"], own["dtype"], strict=True))
        lacking = [run["series"] for _, run in frame.drop_duplicates(["method", "dtype"]).iterrows()
                   if (run["method"], run["dtype"]) not in have]  # fmt: skip
        handles += [Line2D([], [], ls="", label=f"{name}: not run") for name in lacking]
        row[0].set_ylabel("SQNR (dB)")
        row[0].set_ylim(top=min(row[0].get_ylim()[1], TOP))
        row[1].legend(handles=handles, **style.BESIDE)
    study = frame.iloc[0]["study"].replace("_", " ")
    figure.suptitle(f"SQNR by layer on validation images ({study}); gaps and the top edge: hardly rounded", fontsize=9)
    style.save(figure, args.out, "layer_sqnr")


if __name__ == "__main__":
    main()
