"""The table of a study: printed, and written to results/STUDY/tables.md.

python figures/tables.py --study cats_and_dogs
"""

import pandas as pd
import style

from utils import paths


def main():
    frame, args = style.load(__doc__)
    frame, batch = style.one_batch(frame)
    low, high = 100 * frame["accuracy_ci_low"], 100 * frame["accuracy_ci_high"]
    table = pd.DataFrame({
        "model": frame["model"].map(style.MODELS),
        "variant": frame["series"],
        "seed": frame["seed"],
        "accuracy %": (100 * frame["accuracy"]).map("{:.2f}".format),
        "95 % interval": low.map("{:.2f}".format) + " to " + high.map("{:.2f}".format),
        "agrees with FP32 %": (100 * frame["agreement_fp32"]).map("{:.2f}".format),
        "SQNR dB": frame["sqnr_db"].map(lambda value: number(value, 1)),
        "size MiB": frame["size_mb"].map("{:.2f}".format),
        f"ms at batch {batch}": frame["latency_ms_p50"].map(number),
        "speed-up over eager FP32": frame["speedup_vs_eager_fp32"].map(number)
        + frame["contended"].map({True: " (contended)"}).fillna(""),
    })  # fmt: skip
    text = f"{style.title(frame, f'Study {args.study}')}\n\n{markdown(table)}\n"
    if (repeated := over_seeds(frame)) is not None:
        text += f"\nOver seeds (accuracy in %, spread as the standard deviation in points)\n\n{markdown(repeated)}\n"
    path = args.results / args.study / "tables.md"
    paths.write_text(path, text)
    print(f"{text}\nwritten: {path}")


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and spread of the accuracy of what was run with more than one seed; None where nothing was."""
    frame = frame.assign(model=frame["model"].astype(str), accuracy=100 * frame["accuracy"])
    found = frame.groupby(["model", "series"], sort=False)["accuracy"].agg(["count", "mean", "std", "min", "max"]).reset_index()
    found = found[found["count"] > 1]
    if found.empty:
        return None
    spread = {name: found[name].map("{:.2f}".format) for name in ("mean", "std", "min", "max")}
    return pd.DataFrame(
        {"model": found["model"].map(style.MODELS), "variant": found["series"], "seeds": found["count"], **spread}
    )


def number(value: float, digits: int = 2) -> str:
    """A number with so many digits after the point; nothing where there is none."""
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def markdown(table: pd.DataFrame) -> str:
    """A frame of strings as a Markdown table whose columns line up as plain text too."""
    rows = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows)


if __name__ == "__main__":
    main()
