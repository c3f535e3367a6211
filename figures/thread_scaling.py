"""Latency at the smallest batch size on one thread against all threads, and how many times faster all are.

python figures/thread_scaling.py --study cats_and_dogs
"""

import pandas as pd
import style


def main():
    frame, args = style.load(__doc__)
    few, many = frame["threads"].min(), frame["threads"].max()
    every, batch = style.one_batch(frame)
    one, _ = style.one_batch(frame[frame["threads"] == few])
    every, one = style.first_seed(every), style.first_seed(one)
    title = f"Latency and number of threads (medians with 95 % intervals{style.contended(pd.concat([every, one]))})"
    both = every.merge(one[[*style.RUN, "latency_ms_p50", "contended"]], on=style.RUN, how="left", suffixes=("", "_one"))
    disturbed = both["contended"].eq(True) | both["contended_one"].eq(True)
    both["star"] = disturbed.map({True: "*", False: ""})  # one for both marks, behind the ratio: the marks are too near for stars
    rows = style.labels(every)
    figure, panels = style.panels(every, rows)
    for axes, model, own in panels:
        style.gaps(axes, own, rows, "latency_ms_p50")
        for _, row in both[both["model"] == model].dropna(subset=["latency_ms_p50", "latency_ms_p50_one"]).iterrows():
            ends, place = [row["latency_ms_p50"], row["latency_ms_p50_one"]], rows.index(row["series"])
            axes.plot(ends, [place, place], color="0.4", lw=1, zorder=2)
            if few != many:
                text = f"{ends[1] / ends[0]:.1f}x{row['star']}"
                axes.annotate(text, (max(ends), place), (11, 0), textcoords="offset points", fontsize=6,
                    va="center")  # fmt: skip
        if few != many:
            less = one[one["model"] == model].assign(contended=False)
            style.dots(axes, less, rows, "latency_ms_p50", "latency_ms_ci", ms=4)
        starred = own if few == many else own.assign(contended=False)
        style.dots(axes, starred, rows, "latency_ms_p50", "latency_ms_ci")
        axes.set_xscale("log")
        axes.margins(x=0.1)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.2)  # room for the ratio
        style.log_scale(axes.xaxis)
        axes.set_xlabel(f"ms at batch {batch} (log scale)")
    names = {7: f"{many} threads", 4: f"{few} thread{'s' if few > 1 else ''}"} if few != many else {7: f"{many} threads only"}
    style.sizes(figure, names)
    figure.suptitle(style.title(frame, title), fontsize=9)
    style.save(figure, args.out, "thread_scaling")


if __name__ == "__main__":
    main()
