"""What PTQ and QAT change in accuracy against FP32, format by format and engine by engine, beside the margin allowed.

python figures/ptq_vs_qat.py --study cats_and_dogs
"""

import style

CONTROL = "control (FP32)"
SIDES = {"control": 0, "ptq": -0.2, "qat": 0.2}  # where in its row a method's mark lies


def main():
    frame, args = style.load(__doc__)
    frame, _ = style.one_batch(frame)
    frame = frame[frame["method"] != "fp32"]
    if frame.empty:
        raise SystemExit(f"error: study {args.study} has no quantized runs yet.")
    cells = frame["series"].str.replace(" PTQ| QAT", "", regex=True).where(frame["method"] != "control", CONTROL)
    frame = frame.assign(cell=cells)
    rows = style.labels(frame, "cell")
    figure, panels = style.panels(frame, rows)
    for axes, _, own in panels:
        for method, shift in SIDES.items():
            part = own[own["method"] == method]
            asked = [name if (name == CONTROL) == (method == "control") else "" for name in rows]
            what = "" if method == "control" else f"{style.METHODS[method]} "
            style.gaps(axes, part, asked, "accuracy_difference", by="cell", shift=shift, what=what)
            style.dots(axes, part, asked, "accuracy_difference", "accuracy_difference_ci", by="cell", scale=100, shift=shift)
        axes.axvline(0, color="black", lw=0.8, zorder=1)
        for margin in set(own["margin"].dropna()):
            axes.axvline(-100 * margin, color="black", lw=1.2, ls="--", zorder=1)
        axes.set_xlabel("Difference to FP32 (points)")
    text = "Accuracy against FP32 on the same images\n(full: PTQ, empty: QAT; 95 % intervals; dashed: the margin)"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args.out, "ptq_vs_qat")


if __name__ == "__main__":
    main()
