"""Where the error of INT8 arises: SQNR of every layer after each step of the method.

    python figures/ablation_layers.py --study cats_and_dogs

Draws ablation_layers.csv, which quantization/ablation.py writes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import ablations, script, style
from figures.shared.style import plt

TABLE = "ablation_layers.csv"
STACKED = ("stacked", "trained")  # kinds of steps that build on the steps before them
DARKEST, LIGHTEST = 0, 40  # dB: noise as strong as the signal, and hardly any noise


def applies(frame, args):
    """Whether all.py draws it for this study."""
    return not ablations.read(args, TABLE).empty


def make(frame, args):
    groups = []
    for model, backend, rows in ablations.groups(args, TABLE):
        groups.append((model, backend, rows[rows["kind"].isin(STACKED)]))
    heights = [0.9 + 0.2 * rows["rung"].nunique() for _, _, rows in groups]
    size = dict(figsize=(7.5, 0.8 + sum(heights)), height_ratios=heights, layout="constrained")
    figure, panels = plt.subplots(len(groups), 1, squeeze=False, **size)
    for axes, (model, backend, rows) in zip(panels[:, 0], groups, strict=True):
        table = rows.pivot(index="rung", columns="layer", values="sqnr_db")
        table = table.loc[rows["rung"].unique(), rows["layer"].unique()]
        shades = style.shaded(axes, table, cmap="cividis", vmin=DARKEST, vmax=LIGHTEST)
        axes.set_yticks(range(len(table)), table.index, fontsize=7)
        axes.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=4.5)
        axes.set_title(ablations.heading(model, backend), fontsize=9, loc="left")
    label = "SQNR of the layer's output (dB); white: no error"
    figure.colorbar(shades, ax=panels[:, 0], label=label, extend="both", aspect=40, fraction=0.03)
    text = "Where the error of INT8 arises, layer by layer in order of computation"
    figure.suptitle(text, fontsize=9)
    style.save(figure, args, "ablation_layers")


if __name__ == "__main__":
    script.run(make, __doc__)
