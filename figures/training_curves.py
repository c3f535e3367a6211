"""Loss and validation accuracy by epoch: FP32 training, QAT and its FP32 control.

python figures/training_curves.py --study cats_and_dogs
"""

import sys
from pathlib import Path

from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from figures.shared.style import plt
from utils import catalog
from utils.errors import UserError

FP32 = ("fp32",)
TUNED = tuple(
    name
    for tuned, method in catalog.METHODS.items()
    if method.native
    for name in (method.native, tuned)
)
# A row of panels: its methods, the columns drawn, and its name. Losses of FP32 and of fine-tuning
# do not share a panel: they are different ones, since QAT has a teacher.
ROWS = (
    (FP32, ("train_loss", "validation_loss"), "FP32: loss"),
    (FP32, ("validation_accuracy",), "FP32: validation\naccuracy (%)"),
    (TUNED, ("train_loss",), "Fine-tuning:\ntraining loss"),
    (TUNED, ("validation_loss",), "Fine-tuning:\nvalidation loss"),
    (TUNED, ("validation_accuracy",), "Fine-tuning: val.\naccuracy (%)"),
)


def histories(frame, args):
    """List (row, training, name) of each training; several engines may share one. Fine-tuning of one epoch has no curve."""
    shared = {}
    for _, row in frame[frame["method"].isin(FP32 + TUNED)].iterrows():
        training = runs.record(runs.path(args, row), "training")["training"]
        if row["method"] in FP32 or len(training["history"]) > 1:
            key = (row["model"], row["method"], row["dtype"], str(training["history"]))
            shared.setdefault(key, (row, training, []))[2].append(row["backend"])
    trainings = list(shared.values())
    return [(row, training, named(row, engines, trainings)) for row, training, engines in trainings]


def named(row, engines, trainings):
    """Name a training, with its engines where others of its method and format differ."""
    kin = [
        other
        for other in trainings
        if all(other[0][name] == row[name] for name in ("method", "dtype"))
    ]
    name = row["series"].removesuffix(row["backend"])
    if len({engine for _, _, names in kin for engine in names}) == 1:
        return row["series"]
    one_each = len({other["model"] for other, _, _ in kin}) == len(kin)
    return name.strip() if one_each else name + "/".join(engines)


def curves(axes, row, training, label, columns):
    """Draw columns of one history and return their legend entries."""
    epochs = [epoch["epoch"] + 1 for epoch in training["history"]]
    patterns = ("-", "--") if len(columns) > 1 else (catalog.BACKENDS[row["backend"]].dashes,)
    legend = {}
    for column, dashes in zip(columns, patterns, strict=True):
        scale = 100 if column == "validation_accuracy" else 1
        values = [scale * epoch[column] for epoch in training["history"]]
        line = dict(color=style.colour(row), ls=dashes, lw=1.4)
        axes.plot(epochs, values, path_effects=style.OUTLINE, **line)
        axes.plot(epochs, values, ls="", **style.look(row) | dict(ms=3.5))
        kept = training["best_epoch"]
        axes.plot(
            epochs[kept],
            values[kept],
            marker="o",
            ms=9,
            mfc="none",
            mec="black",
            mew=0.8,
            clip_on=False,
        )
        name = column.split("_")[0] if len(columns) > 1 else label
        legend[name] = Line2D([], [], label={"train": "training"}.get(name, name), **line)
    return legend


def make(frame, args):
    trainings = histories(frames.one_batch(frame)[0], args)
    models = frames.present(frame)
    rows = [row for row in ROWS if any(run["method"] in row[0] for run, _, _ in trainings)]
    if not rows:
        raise UserError(
            f"study {args.study} has no training to draw: run the scripts in models/ first."
        )
    size = dict(
        figsize=(2.2 + 2 * len(models), 0.9 + 1.3 * len(rows)),
        squeeze=False,
        sharex=False,
        layout="constrained",
    )
    figure, panels = plt.subplots(len(rows), len(models), **size)
    for line, (methods, columns, name) in zip(panels, rows, strict=True):
        legend = {}
        for axes, model in zip(line, models, strict=True):
            part = [
                training
                for training in trainings
                if training[0]["model"] == model and training[0]["method"] in methods
            ]
            for row, training, label in part:
                legend |= curves(axes, row, training, label, columns)
            if not part:
                axes.text(
                    0.5,
                    0.5,
                    "not run",
                    transform=axes.transAxes,
                    ha="center",
                    color="0.4",
                    fontsize=7,
                )
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, 0.5), max(high, 1.5))  # so that a single epoch has one tick
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        line[0].set_ylabel(name, fontsize=7.5)
        line[-1].legend(handles=list(legend.values()), **style.BESIDE)
    for column, model in enumerate(models):
        panels[0][column].set_title(catalog.MODELS[model].label, fontsize=9)
        panels[-1][column].set_xlabel("Epoch")
    study = frame.iloc[0]["study"].replace("_", " ")
    figure.suptitle(f"Training ({study}); a ring marks the epoch that was kept", fontsize=9)
    style.save(figure, args, "training_curves")


if __name__ == "__main__":
    script.run(make, __doc__)
