"""Confusion matrix of every variant: which animals each deployed network takes for the other.

python figures/confusion_matrices.py --study cats_and_dogs
"""

import numpy as np
import style


def matrix(row):
    """Counts [[cats right, cats wrong], [dogs wrong, dogs right]]: a row is what it is, a column what it is taken for."""
    return np.array([[row["tn"], row["fp"]], [row["fn"], row["tp"]]], dtype=int)


def main():
    frame, args = style.load(__doc__)
    figure, panels = style.grid(style.first_seed(frame), cell=0.85)
    for axes, row in panels:
        counts = matrix(row)
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.25)
        for (y, x), count in np.ndenumerate(counts):
            axes.text(x, y, count, ha="center", va="center", fontsize=7, color="white" if shares[y, x] > 0.6 else "black")
        axes.set_xticks([0, 1], ["cat", "dog"], fontsize=5.5)
        axes.set_yticks([0, 1], ["cat", "dog"], fontsize=5.5, rotation=90, va="center")
        axes.tick_params(length=0, pad=1)
        axes.grid(False)
    text = "Confusion matrices: rows are what the image shows,\ncolumns what it is taken for (shade: share of the row)"
    figure.suptitle(style.title(frame, text), fontsize=8)
    style.save(figure, args.out, "confusion_matrices")


if __name__ == "__main__":
    main()
