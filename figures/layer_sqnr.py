"""Signal-to-quantization-noise ratio of every layer's weights and outputs: where a network loses its accuracy.

python figures/layer_sqnr.py --study cats_and_dogs
"""

import style
from matplotlib.patheffects import Stroke, withStroke
from style import plt

from utils import cli, results

SIDES = {"weight_sqnr_db": "Weights", "output_sqnr_db": "Outputs, errors of earlier layers included"}
DASHES = {"ptq": "-", "qat": (0, (4, 1.5))}
TOP = 110  # dB; 16 bits reach about 100, more is FP32 summed in another order
OUTLINE = [Stroke(linewidth=2.2, foreground="0.25"), withStroke(linewidth=0)]  # light colours stay visible in grey


def main():
    frame, args = style.load(__doc__)
    rank = {(*kind, backend): n for kind, own in cli.BACKENDS.items() for n, backend in enumerate(own)}
    frame = frame[frame["method"].isin(DASHES)].drop_duplicates(["model", "method", "dtype", "backend", "seed"])
    order = [rank[key] for key in zip(frame["method"], frame["dtype"], frame["backend"], strict=True)]
    frame = frame.assign(rank=order).sort_values(["rank", "seed"]).drop_duplicates(["model", "method", "dtype"])
    models = [name for name in style.MODELS if name in set(frame["model"])]
    if not models:
        raise SystemExit(f"error: study {args.study} has no quantized runs yet.")
    size = (9, 0.9 + 2.3 * len(models))
    figure, panels = plt.subplots(len(models), 2, figsize=size, squeeze=False, sharey="row", layout="constrained")
    for row, model in zip(panels, models, strict=True):
        for _, run in frame[frame["model"] == model].sort_values(["dtype", "method"]).iterrows():
            layers = results.read(args.results / args.study / "runs" / f"{results.run_id(run)}.json")["layers"]
            for axes, side in zip(row, SIDES, strict=True):
                values = [float("nan") if layer[side] is None else layer[side] for layer in layers]
                axes.plot(values, color=style.COLOUR[run["dtype"]], ls=DASHES[run["method"]], lw=1.6, path_effects=OUTLINE,
                    label=run["series"], marker=".", ms=4)  # fmt: skip
                axes.set_xticks(range(len(layers)), [layer["layer"] for layer in layers], rotation=90, fontsize=4.5)
                axes.set_title(f"{style.MODELS[model]}: {SIDES[side]}", fontsize=8)
        row[0].set_ylabel("SQNR (dB)")
        row[0].set_ylim(top=min(row[0].get_ylim()[1], TOP))
        row[1].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    study = frame.iloc[0]["study"].replace("_", " ")
    figure.suptitle(f"SQNR by layer on validation images ({study}); gaps and the top edge: hardly rounded", fontsize=9)
    style.save(figure, args.out, "layer_sqnr")


if __name__ == "__main__":
    main()
