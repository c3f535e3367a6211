"""A study beside another one of the same experiments, row by row: what was reproduced, and what differs around it. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from figures.shared import frames
from figures.shared.cells import POINTS, RATIO, number, text
from utils import catalog, stats
from utils.errors import UserError

SAME_SIZE = 0.01  # files whose sizes differ by at most this share count as equally large
SETTINGS = {  # columns whose differences are named, and what they are called
    "data_sha256": "images", "n_test": "test images", "torch": "torch", "processor": "processor", "threads": "threads",
    "batch_size": "batch size", "protocol": "timing protocol", "tier": "timing", "git_commit": "commit",
}  # fmt: skip
NOTE = (
    "Here: {here}; there: {there}. Runs in both: {both}. Inside the intervals: accuracy {accuracy}, points to FP32 {points}, "
    "speed-up over eager FP32 {speed}; size {size}. Inside: the 95 % interval of the difference, or of the ratio of speed-ups, "
    "holds no difference (MOVER, from the intervals of both); about one of twenty is outside by chance. Sizes: within "
    "{same:.0%}. {only}What differs: {differs}."
)


class Quantity(NamedTuple):
    """A number of a run that is compared by its interval."""

    column: str  # its bounds are `column`_ci_low and _ci_high
    less: str  # the outcome where it is smaller here
    more: str
    ratio: bool = False  # compared by the ratio, not the difference


ACCURACY = Quantity("accuracy", "accuracy lower", "accuracy higher")
POINTS_TO_FP32 = Quantity("accuracy_difference", "loses more", "loses less")
SPEED = Quantity("speedup_vs_eager_fp32", "gains less speed", "gains more speed", ratio=True)


def beside(
    here: pd.DataFrame, there: pd.DataFrame, name: str, other: str
) -> tuple[str, pd.DataFrame]:
    """Note and cells of the table that compares the study `here`, called `name`, with that `there`.

    Both are frames of `frames.read`. Raises `UserError` if they have no run in common.
    """
    (ours, _), (theirs, _) = frames.of_all_seeds(here), frames.of_all_seeds(there)
    both = ours.merge(theirs, on=frames.RUN, suffixes=("", "_there"))
    if both.empty:
        raise UserError(
            f"{name} and {other} have no run in common: none of the same model, method, format, engine and seed."
        )
    rows = both.to_dict("records")
    outcomes = {
        quantity: [compared(row, quantity) for row in rows]
        for quantity in (ACCURACY, POINTS_TO_FP32, SPEED)
    }
    sizes = [size_outcome(row) for row in rows]
    cells = table(both, outcomes, sizes)
    inside = {key: counted([outcome for _, outcome in outcomes[q]]) for key, q in
              (("accuracy", ACCURACY), ("points", POINTS_TO_FP32), ("speed", SPEED))}  # fmt: skip
    only = "".join(missing(ours, theirs, where) for where in ("here", "there"))
    note = NOTE.format(
        here=name, there=other, both=len(both), size=counted(sizes), same=SAME_SIZE, only=only,
        differs="; ".join(differences(here, there)) or "nothing that results.csv tells", **inside,
    )  # fmt: skip
    return note, cells


def compared(row: dict, quantity: Quantity) -> tuple[str, str | None]:
    """The difference or ratio of a quantity with its interval, as a cell, and its outcome.

    The outcome is "" where the interval holds no difference, else which way it differs; None where
    one of the two runs lacks the number.
    """
    sides = []
    for suffix in ("", "_there"):
        values = [row[f"{quantity.column}{end}{suffix}"] for end in ("", "_ci_low", "_ci_high")]
        if any(pd.isna(value) for value in values):
            return "", None
        sides.append(np.log(values) if quantity.ratio else np.array(values))
    ends = np.array([sides[0][0] - sides[1][0], *stats.difference(*sides)])
    ends = np.exp(ends) if quantity.ratio else 100 * ends
    neutral = 1 if quantity.ratio else 0
    outcome = quantity.more if ends[1] > neutral else quantity.less if ends[2] < neutral else ""
    middle, low, high = (number(end, RATIO if quantity.ratio else POINTS) for end in ends)
    return f"{middle} [{low}, {high}]", outcome


def size_outcome(row: dict) -> str | None:
    """The outcome for the size of the file; None where it is not known."""
    ours, theirs = row["size_mb"], row["size_mb_there"]
    if pd.isna(ours) or pd.isna(theirs):
        return None
    return (
        ""
        if abs(ours - theirs) <= SAME_SIZE * theirs
        else "larger file"
        if ours > theirs
        else "smaller file"
    )


def counted(outcomes: list[str | None]) -> str:
    """Say how many outcomes are inside, of those that could be compared."""
    known = [outcome for outcome in outcomes if outcome is not None]
    return f"{known.count('')} of {len(known)}"


def table(both: pd.DataFrame, outcomes: dict, sizes: list[str | None]) -> pd.DataFrame:
    """Cells of the table."""
    words = zip(
        *([outcome for _, outcome in each] for each in outcomes.values()), sizes, strict=True
    )
    differences = {
        quantity: pd.Series([cell for cell, _ in each], dtype=str)
        for quantity, each in outcomes.items()
    }
    seed = ", seed " + both["seed"].astype(str) if both["seed"].nunique() > 1 else ""
    return pd.DataFrame({
        "model": [catalog.MODELS[model].label for model in both["model"]],
        "variant": both["series"] + seed,
        "outcome": ["; ".join(filter(None, each)) or "reproduced" for each in words],
        "accuracy %": text(100 * both["accuracy"]),
        "there %": text(100 * both["accuracy_there"]),
        "difference": differences[ACCURACY],
        "points to FP32": text(100 * both["accuracy_difference"], POINTS),
        "points there": text(100 * both["accuracy_difference_there"], POINTS),
        "difference of points": differences[POINTS_TO_FP32],
        "x eager FP32": text(both["speedup_vs_eager_fp32"], RATIO),
        "x there": text(both["speedup_vs_eager_fp32_there"], RATIO),
        "ratio": differences[SPEED],
        "MiB": text(both["size_mb"]),
        "MiB there": text(both["size_mb_there"]),
    })  # fmt: skip


def missing(ours: pd.DataFrame, theirs: pd.DataFrame, where: str) -> str:
    """Say which runs are only `where`, "here" or "there"; nothing if none is."""
    frame, others = (ours, theirs) if where == "here" else (theirs, ours)
    keys, known = (
        pd.MultiIndex.from_frame(each[frames.RUN].astype(str)) for each in (frame, others)
    )
    alone = frame[~keys.isin(known)]
    if alone.empty:
        return ""
    seed = " of seed " + alone["seed"].astype(str) if frame["seed"].nunique() > 1 else ""
    labels = (
        alone["model"]
        .astype(str)
        .map({name: model.label for name, model in catalog.MODELS.items()})
    )
    names = labels + " " + alone["series"] + seed
    more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
    return f"Only {where}: {', '.join(names.head(3))}{more}. "


def differences(here: pd.DataFrame, there: pd.DataFrame) -> Iterator[str]:
    """Yield the settings in which two studies differ, "torch 2.13.0 here, 2.7.0 there"."""
    both = pd.concat([here, there], keys=["here", "there"])
    both["processor"] = frames.processor_of_each(
        both
    )  # by both, because clouds call different ones by the same name
    here, there = both.loc["here"], both.loc["there"]
    for column, label in SETTINGS.items():
        ours, theirs = (
            sorted(frame[column].dropna().astype(str).unique()) for frame in (here, there)
        )
        if ours != theirs:
            short = 10 if column in ("data_sha256", "git_commit") else None  # enough of a hash
            sides = [
                " and ".join(value[:short] for value in side) or "unknown"
                for side in (ours, theirs)
            ]
            yield f"{label} {sides[0]} here, {sides[1]} there"
