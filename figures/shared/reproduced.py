"""Two studies of the same experiments: what is reproduced, and what differs. No torch."""

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

SAME_SIZE = 0.01  # files count as equally large if their sizes differ by at most this share
SETTINGS = {  # columns whose differences are named, and their names in the text
    "data_sha256": "images",
    "n_test": "test images",
    "torch": "torch",
    "processor": "processor",
    "threads": "threads",
    "batch_size": "batch size",
    "protocol": "timing protocol",
    "tier": "timing",
    "git_commit": "commit",
}
HASHES = ("data_sha256", "git_commit")
HASH_DIGITS = 10  # enough to tell hashes apart
NOTE = (
    "Here: {here}; there: {there}. Runs in both: {both}. Inside the intervals: accuracy "
    "{accuracy}, points to FP32 {points}, speed-up over eager FP32 {speed}; size {size}. Inside: "
    "the 95 % interval of the difference, or of the ratio of speed-ups, contains no difference "
    "(MOVER, from the intervals of both); about one of twenty is outside by chance. Sizes: within "
    "{same:.0%}. {only}What differs: {differs}."
)


class Quantity(NamedTuple):
    """A number of a run that is compared by its interval."""

    column: str  # its bounds are `column`_ci_low and _ci_high
    less: str  # the outcome if it is smaller here
    more: str
    ratio: bool = False  # compared by the ratio, not the difference


ACCURACY = Quantity("accuracy", "accuracy lower", "accuracy higher")
POINTS_TO_FP32 = Quantity("accuracy_difference", "loses more", "loses less")
SPEED = Quantity("speedup_vs_eager_fp32", "gains less speed", "gains more speed", ratio=True)
QUANTITIES = (ACCURACY, POINTS_TO_FP32, SPEED)


def comparison(
    here: pd.DataFrame, there: pd.DataFrame, name: str, other: str
) -> tuple[str, pd.DataFrame]:
    """Note and cells of the table that compares study `name` (`here`) with `other` (`there`).

    Both are frames of `frames.read`. Raises `UserError` if they have no run in common.
    """
    (ours, _), (theirs, _) = frames.of_all_seeds(here), frames.of_all_seeds(there)
    both = ours.merge(theirs, on=frames.RUN, suffixes=("", "_there"))
    if both.empty:
        raise UserError(
            f"{name} and {other} have no run in common: none has the same model, method, format, "
            "engine and seed."
        )
    rows = both.to_dict("records")
    compared_rows = {quantity: [compared(row, quantity) for row in rows] for quantity in QUANTITIES}
    differences = {
        quantity: pd.Series([cell for cell, _ in pairs], dtype=str)
        for quantity, pairs in compared_rows.items()
    }
    outcomes = {
        quantity: [outcome for _, outcome in pairs] for quantity, pairs in compared_rows.items()
    }
    sizes = [size_outcome(row) for row in rows]
    note = NOTE.format(
        here=name,
        there=other,
        both=len(both),
        accuracy=counted(outcomes[ACCURACY]),
        points=counted(outcomes[POINTS_TO_FP32]),
        speed=counted(outcomes[SPEED]),
        size=counted(sizes),
        same=SAME_SIZE,
        only=missing(ours, theirs, "here") + missing(theirs, ours, "there"),
        differs="; ".join(setting_differences(here, there)) or "nothing that results.csv tells",
    )
    words = summaries([*outcomes.values(), sizes])
    return note, table(both, words, differences)


def compared(row: dict, quantity: Quantity) -> tuple[str, str | None]:
    """Difference or ratio of a quantity with its interval, as a cell, and its outcome.

    The outcome is "" if the interval contains no difference, otherwise the direction of the
    difference; None if a run lacks the number.
    """
    sides = []
    for suffix in ("", "_there"):
        values = [row[f"{quantity.column}{end}{suffix}"] for end in ("", "_ci_low", "_ci_high")]
        if any(pd.isna(value) for value in values):
            return "", None
        sides.append(np.log(values) if quantity.ratio else np.array(values))
    ends = np.array([sides[0][0] - sides[1][0], *stats.difference(*sides)])
    if quantity.ratio:
        ends, neutral, form = np.exp(ends), 1, RATIO
    else:
        ends, neutral, form = 100 * ends, 0, POINTS
    outcome = ""
    if ends[1] > neutral:
        outcome = quantity.more
    elif ends[2] < neutral:
        outcome = quantity.less
    middle, low, high = (number(end, form) for end in ends)
    return f"{middle} [{low}, {high}]", outcome


def size_outcome(row: dict) -> str | None:
    """Outcome for the size of the file; None if a size is unknown."""
    ours, theirs = row["size_mb"], row["size_mb_there"]
    if pd.isna(ours) or pd.isna(theirs):
        return None
    if abs(ours - theirs) <= SAME_SIZE * theirs:
        return ""
    return "larger file" if ours > theirs else "smaller file"


def counted(outcomes: list[str | None]) -> str:
    """Count the outcomes inside their intervals, of all that could be compared."""
    known = [outcome for outcome in outcomes if outcome is not None]
    return f"{known.count('')} of {len(known)}"


def summaries(columns: list[list[str | None]]) -> list[str]:
    """Summarize each run in words from its outcome for each quantity."""
    return ["; ".join(filter(None, row)) or "reproduced" for row in zip(*columns, strict=True)]


def table(both: pd.DataFrame, words: list[str], differences: dict) -> pd.DataFrame:
    """Cells of the table."""
    seed = ", seed " + both["seed"].astype(str) if both["seed"].nunique() > 1 else ""
    return pd.DataFrame({
        "model": [catalog.MODELS[model].label for model in both["model"]],
        "variant": both["series"] + seed,
        "outcome": words,
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


def missing(frame: pd.DataFrame, others: pd.DataFrame, where: str) -> str:
    """Name the runs that only `frame` has, which is `where`; empty if there is none."""
    keys = pd.MultiIndex.from_frame(frame[frames.RUN].astype(str))
    known = pd.MultiIndex.from_frame(others[frames.RUN].astype(str))
    alone = frame[~keys.isin(known)]
    if alone.empty:
        return ""
    seed = " of seed " + alone["seed"].astype(str) if frame["seed"].nunique() > 1 else ""
    labels = {name: model.label for name, model in catalog.MODELS.items()}
    names = alone["model"].astype(str).map(labels) + " " + alone["series"] + seed
    more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
    return f"Only {where}: {', '.join(names.head(3))}{more}. "


def setting_differences(here: pd.DataFrame, there: pd.DataFrame) -> Iterator[str]:
    """Yield the settings that differ between two studies: "torch 2.13.0 here, 2.7.0 there"."""
    both = pd.concat([here, there], keys=["here", "there"])
    # Both studies together, because clouds give different processors the same name.
    both["processor"] = frames.processor_of_each(both)
    for column, label in SETTINGS.items():
        ours, theirs = (values_of(both.loc[side], column) for side in ("here", "there"))
        if ours != theirs:
            yield f"{label} {listed(ours, column)} here, {listed(theirs, column)} there"


def values_of(frame: pd.DataFrame, column: str) -> list[str]:
    """Sorted different values of a column, as text."""
    return sorted(frame[column].dropna().astype(str).unique())


def listed(values: list[str], column: str) -> str:
    """Join the values of a setting, hashes shortened."""
    length = HASH_DIGITS if column in HASHES else None
    return " and ".join(value[:length] for value in values) or "unknown"
