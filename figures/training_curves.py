"""Loss and validation accuracy by epoch: FP32 training, QAT and its FP32 control.

python figures/training_curves.py --study cats_and_dogs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import frames, runs, script, style
from figures.shared.style import Line2D, plt
from utils import catalog
from utils.errors import UserError

FP32 = ("fp32",)
TRAINED = [name for name, method in catalog.METHODS.items() if method.native]
# Each method that trains comes after its control.
TUNED = tuple(name for trained in TRAINED for name in (catalog.METHODS[trained].native, trained))
# A row of panels: its methods, the columns drawn, and its name. The losses of FP32 and of
# fine-tuning do not share a panel: they are different losses, because QAT has a teacher.
ROWS = (
    (FP32, ("train_loss", "validation_loss"), "FP32: loss"),
    (FP32, ("validation_accuracy",), "FP32: validation\naccuracy (%)"),
    (TUNED, ("train_loss",), "Fine-tuning:\ntraining loss"),
    (TUNED, ("validation_loss",), "Fine-tuning:\nvalidation loss"),
    (TUNED, ("validation_accuracy",), "Fine-tuning: val.\naccuracy (%)"),
)
RING = dict(marker="o", ms=9, mfc="none", mec="black", mew=0.8, clip_on=False)


def histories(frame, args):
    """List (row, training, name) of each training, which several engines may share.

    Fine-tuning of one epoch has no curve.
    """
    shared = {}
    for _, row in frame[frame["method"].isin(FP32 + TUNED)].iterrows():
        training = runs.record(runs.path(args, row), "training")["training"]
        if row["method"] in FP32 or len(training["history"]) > 1:
            key = (row["model"], row["method"], row["dtype"], str(training["history"]))
            shared.setdefault(key, (row, training, []))[2].append(row["backend"])
    trainings = list(shared.values())
    return [(row, training, named(row, engines, trainings)) for row, training, engines in trainings]


def named(row, engines, trainings):
    """Name a training, with its engines if others of its method and format differ."""
    kin = [
        (other, names)
        for other, _, names in trainings
        if (other["method"], other["dtype"]) == (row["method"], row["dtype"])
    ]
    if len({engine for _, names in kin for engine in names}) == 1:
        return row["series"]
    name = row["series"].removesuffix(row["backend"])
    one_per_model = len({other["model"] for other, _ in kin}) == len(kin)
    return name.strip() if one_per_model else name + "/".join(engines)


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
        axes.plot(epochs[kept], values[kept], **RING)
        name = column.split("_")[0] if len(columns) > 1 else label
        legend[name] = Line2D([], [], label={"train": "training"}.get(name, name), **line)
    return legend


def draw(axes, part, columns):
    """Draw the trainings of one model and return their legend entries."""
    legend = {}
    for row, training, label in part:
        legend |= curves(axes, row, training, label, columns)
    if not part:
        style.not_run(axes, fontsize=7)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 1.5))  # so that a single epoch has one tick
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return legend


def make(frame, args):
    trainings = histories(frames.one_batch(frame)[0], args)
    models = frames.present(frame)
    trained = {run["method"] for run, _, _ in trainings}
    rows = [row for row in ROWS if trained & set(row[0])]
    if not rows:
        raise UserError(
            f"study {args.study} has no training to draw: run the scripts in models/ first."
        )
    size = dict(figsize=(2.2 + 2 * len(models), 0.9 + 1.3 * len(rows)), layout="constrained")
    figure, panels = plt.subplots(len(rows), len(models), squeeze=False, **size)
    for line, (methods, columns, name) in zip(panels, rows, strict=True):
        of_methods = [training for training in trainings if training[0]["method"] in methods]
        legend = {}
        for axes, model in zip(line, models, strict=True):
            part = [training for training in of_methods if training[0]["model"] == model]
            legend |= draw(axes, part, columns)
        line[0].set_ylabel(name, fontsize=7.5)
        line[-1].legend(handles=list(legend.values()), **style.LEGEND_BESIDE)
    for column, model in enumerate(models):
        panels[0][column].set_title(catalog.MODELS[model].label, fontsize=9)
        panels[-1][column].set_xlabel("Epoch")
    study = frame.iloc[0]["study"].replace("_", " ")
    figure.suptitle(f"Training ({study}); a ring marks the epoch that was kept", fontsize=9)
    style.save(figure, args, "training_curves")


if __name__ == "__main__":
    script.run(make, __doc__)
