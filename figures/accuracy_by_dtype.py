"""Accuracy of every deployed network, with its interval, beside its FP32 baseline.

python figures/accuracy_by_dtype.py --study cats_and_dogs
"""

import style


def main():
    frame, args = style.load(__doc__)
    frame, _ = style.one_batch(frame)
    rows = style.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, _, own in panels:
        style.gaps(axes, own, rows, "accuracy")
        style.dots(axes, own, rows, "accuracy", "accuracy_ci", scale=100)
        style.baseline(axes, own, "accuracy", scale=100)
        axes.set_xlabel("Test accuracy (%)")
    figure.suptitle(style.title(frame, "Accuracy by number format (95 % Wilson intervals; dotted: FP32)"), fontsize=9)
    style.save(figure, args.out, "accuracy_by_dtype")


if __name__ == "__main__":
    main()
