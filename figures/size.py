"""Size of the file that one would deploy, beside what its weights alone would take.

python figures/size.py --study cats_and_dogs
"""

import style


def main():
    frame, args = style.load(__doc__)
    frame, _ = style.one_batch(frame)
    rows = style.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, _, own in panels:
        style.gaps(axes, own, rows, "size_mb")
        style.dots(axes, own, rows, "size_mb")
        style.dots(axes, own, rows, "theoretical_mb", marker="|", ms=15, mew=1.2, path_effects=None,
            markeredgecolor="0.3")  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_xlabel("Size (MiB)")
    figure.suptitle(style.title(frame, "Size of the deployed file (upright line: its weights alone, computed)"), fontsize=9)
    style.save(figure, args.out, "size")


if __name__ == "__main__":
    main()
