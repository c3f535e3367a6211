"""Latency at the smallest batch size on all threads, with its interval, beside eager FP32.

python figures/latency.py --study cats_and_dogs
"""

import style


def main():
    frame, args = style.load(__doc__)
    frame, batch = style.one_batch(frame)
    rows = style.labels(frame)
    figure, panels = style.panels(frame, rows)
    for axes, _, own in panels:
        style.gaps(axes, own, rows, "latency_ms_p50")
        style.dots(axes, own, rows, "latency_ms_p50", "latency_ms_ci")
        style.baseline(axes, own, "latency_ms_p50")
        style.log_scale(axes.xaxis)
        axes.set_xlabel(f"ms at batch {batch} (log scale)")
    text = f"Latency: median and its 95 % interval (dotted: eager FP32{style.contended(frame)})"
    figure.suptitle(style.title(frame, text), fontsize=9)
    style.save(figure, args.out, "latency")


if __name__ == "__main__":
    main()
