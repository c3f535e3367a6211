"""How many times faster than FP32: than eager FP32, and than the fastest way to run FP32 that was found.

python figures/speedup.py --study cats_and_dogs
"""

import style

SIDES = {"eager": (-0.2, 7), "best": (0.2, 4)}  # where in its row a mark lies, and its size


def main():
    frame, args = style.load(__doc__)
    frame, batch = style.one_batch(frame)
    rows = style.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, model, own in panels:
        style.gaps(axes, own, rows, "speedup_vs_eager_fp32")
        for side, (shift, size) in SIDES.items():
            column = f"speedup_vs_{side}_fp32"
            style.dots(axes, own, rows, column, f"{column}_ci", shift=shift, ms=size)
        axes.axvline(1, color="black", lw=1.2, ls="--", zorder=1)
        style.log_scale(axes.xaxis)
        fastest = " or ".join(sorted(set(own["best_fp32"].dropna()))) or "not timed"
        axes.set_title(f"{style.MODELS[model]}\nfastest FP32: {fastest}", fontsize=8)
        axes.set_xlabel("Speed-up (log scale)")
    style.sizes(figure, {SIDES["eager"][1]: "over eager FP32", SIDES["best"][1]: "over the fastest FP32"})
    text = f"Speed-up at batch {batch} and its 95 % interval (dashed: no change{style.contended(frame)})"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args.out, "speedup")


if __name__ == "__main__":
    main()
