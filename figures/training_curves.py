"""Loss and validation accuracy over the epochs of training: of FP32, and of what is fine-tuned from it (QAT and its control).

python figures/training_curves.py --study cats_and_dogs
"""

import style
from matplotlib.lines import Line2D
from style import plt

from utils import results

FP32, TUNED = ("fp32",), ("control", "qat")
# A row of panels: which runs, what is drawn solid and dashed, and its name. QAT's loss is another than FP32's: it has a teacher.
ROWS = (
    (FP32, ("train_loss", "validation_loss"), "FP32: loss"),
    (FP32, ("validation_accuracy",), "FP32: validation\naccuracy (%)"),
    (TUNED, ("train_loss",), "Fine-tuning:\ntraining loss"),
    (TUNED, ("validation_loss",), "Fine-tuning:\nvalidation loss"),
    (TUNED, ("validation_accuracy",), "Fine-tuning: val.\naccuracy (%)"),
)


def histories(frame, args):
    """(row, training, name) of each training; engines may share one."""
    found = {}
    for _, row in frame[frame["method"].isin(FP32 + TUNED)].iterrows():
        training = results.read(style.record(args, row))["training"]
        key = (row["model"], row["method"], row["dtype"], str(training["history"]))
        found.setdefault(key, (row, training, []))[2].append(row["backend"])
    trainings = list(found.values())
    return [(row, training, named(row, engines, trainings)) for row, training, engines in trainings]


def named(row, engines, trainings):
    """A training's name, with as much about its engines as tells it from the others of its method and number format."""
    kin = [other for other in trainings if all(other[0][name] == row[name] for name in ("method", "dtype"))]
    name = row["series"].removesuffix(row["backend"])
    if len({engine for _, _, own in kin for engine in own}) == 1:
        return row["series"]
    one_each = len({other["model"] for other, _, _ in kin}) == len(kin)
    return name.strip() if one_each else name + "/".join(engines)


def main():
    frame, args = style.load(__doc__)
    trainings = histories(style.first_seed(frame), args)
    models = style.present(frame)
    asked = [row for row in ROWS if any(run["method"] in row[0] for run, _, _ in trainings)]
    if not asked:
        raise SystemExit(f"error: study {args.study} has no training to draw: run the scripts in models/ first.")
    size = dict(figsize=(2.2 + 2 * len(models), 0.9 + 1.3 * len(asked)), squeeze=False, sharex=False, layout="constrained")
    figure, panels = plt.subplots(len(asked), len(models), **size)
    for line, (methods, columns, name) in zip(panels, asked, strict=True):
        legend = {}
        for axes, model in zip(line, models, strict=True):
            own = [training for training in trainings if training[0]["model"] == model and training[0]["method"] in methods]
            for row, training, label in own:
                legend |= curves(axes, row, training, label, columns)
            if not own:
                axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color="0.4", fontsize=7)
            axes.xaxis.get_major_locator().set_params(integer=True)
        line[0].set_ylabel(name, fontsize=7.5)
        line[-1].legend(handles=list(legend.values()), **style.BESIDE)
    for column, model in enumerate(models):
        panels[0][column].set_title(style.MODELS[model], fontsize=9)
        panels[-1][column].set_xlabel("Epoch")
    study = frame.iloc[0]["study"].replace("_", " ")
    figure.suptitle(f"Training ({study}); a ring marks the epoch that was kept", fontsize=9)
    style.save(figure, args.out, "training_curves")


def curves(axes, row, training, label, columns):
    """Draw the columns of one history and return their parts of the legend."""
    epochs = [epoch["epoch"] + 1 for epoch in training["history"]]
    legend = {}
    for column, dashes in zip(columns, ("-", "--") if len(columns) > 1 else (style.DASHES[row["backend"]],), strict=True):
        scale = 100 if column == "validation_accuracy" else 1
        values = [scale * epoch[column] for epoch in training["history"]]
        line = dict(color=style.COLOUR[row["dtype"]], ls=dashes, lw=1.4)
        axes.plot(epochs, values, path_effects=style.OUTLINE, **line)
        axes.plot(epochs, values, ls="", **style.look(row) | dict(ms=3.5))
        kept = training["best_epoch"]
        axes.plot(epochs[kept], values[kept], marker="o", ms=9, mfc="none", mec="black", mew=0.8, clip_on=False)
        name = column.split("_")[0] if len(columns) > 1 else label
        legend[name] = Line2D([], [], label={"train": "training"}.get(name, name), **line)
    return legend


if __name__ == "__main__":
    main()
