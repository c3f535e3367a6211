"""Two studies of the same experiments: what is reproduced, and what differs. No torch.

Runs of both that answered the same test images are compared image by image: their errors are on the
same hard images, so intervals of independent samples would hide most differences.
"""

if __name__ == "__main__":
    import no_script  # noqa: F401

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from figures.shared import frames
from figures.shared.cells import POINTS, RATIO, number, text
from figures.shared.cells import p_value as p_value_cells
from utils import catalog, results, stats
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
    "Here: {here}; there: {there}. Runs in both: {both}. {paired}Inside the intervals: accuracy "
    "{accuracy}, points to FP32 {points}, speed-up over eager FP32 {speed}; size {size}. Inside: "
    "the 95 % interval of the difference, or of the ratio of speed-ups, contains no difference; "
    "about one of twenty is outside by chance. {how}Sizes: within {same:.0%}. {only}What differs: "
    "{differs}."
)
PAIRED = (
    "{paired} of these runs answered the same images, and are compared image by image: the "
    "accuracy of {differ} differs (exact McNemar test, Holm-adjusted for {paired}), of "
    "{unadjusted} before the adjustment, at 5 %; {low} to {high} decisions differ. Their accuracy "
    "counts as inside below if the adjusted test finds no difference. "
)
UNPAIRED = (
    "Runs with other images, and all speed-ups, are compared as independent samples "
    "(MOVER, from the intervals of both). "
)
LEVEL = 0.05  # of the tests


class Study(NamedTuple):
    """One side of a comparison."""

    name: str
    frame: pd.DataFrame  # of `frames.read`
    folder: Path | None = None  # with runs/*.npz; None: no image can be compared


class Pair(NamedTuple):
    """Two runs of one experiment on the same images."""

    n: int  # images
    differing: int  # decisions
    only_here: int  # images that only the run here classifies correctly
    only_there: int
    points: np.ndarray | None  # difference of the differences to FP32, by image; None without FP32


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


def comparison(here: Study, there: Study) -> tuple[str, pd.DataFrame]:
    """Note and cells of the table that compares study `here` with `there`.

    Raises `UserError` if they have no run in common.
    """
    (ours, _), (theirs, _) = frames.of_all_seeds(here.frame), frames.of_all_seeds(there.frame)
    both = ours.merge(theirs, on=frames.RUN, suffixes=("", "_there"))
    if both.empty:
        raise UserError(
            f"{here.name} and {there.name} have no run in common: none has the same model, method, "
            "format, engine and seed."
        )
    rows = both.to_dict("records")
    pairs = [paired(row, here, there) for row in rows]
    p_values = adjusted(pairs)
    compared_rows = {quantity: [compared(row, quantity) for row in rows] for quantity in QUANTITIES}
    for place, pair in enumerate(pairs):
        if pair is not None:
            compared_rows[ACCURACY][place] = of_accuracy(pair, p_values[place])
            if pair.points is not None:
                compared_rows[POINTS_TO_FP32][place] = of_points(pair)
    differences = {
        quantity: pd.Series([cell for cell, _ in cells], dtype=str)
        for quantity, cells in compared_rows.items()
    }
    outcomes = {
        quantity: [outcome for _, outcome in cells] for quantity, cells in compared_rows.items()
    }
    sizes = [size_outcome(row) for row in rows]
    note = NOTE.format(
        here=here.name,
        there=there.name,
        both=len(both),
        paired=in_short(pairs, p_values),
        how=UNPAIRED,
        accuracy=counted(outcomes[ACCURACY]),
        points=counted(outcomes[POINTS_TO_FP32]),
        speed=counted(outcomes[SPEED]),
        size=counted(sizes),
        same=SAME_SIZE,
        only=missing(ours, theirs, "here") + missing(theirs, ours, "there"),
        differs="; ".join(setting_differences(here.frame, there.frame))
        or "nothing that results.csv tells",
    )
    words = summaries([*outcomes.values(), sizes])
    return note, table(both, words, differences, of_images(pairs, p_values))


def paired(row: dict, here: Study, there: Study) -> Pair | None:
    """Compare the answers of a run of both studies; None if they are not about the same images."""
    if row["data_sha256"] != row["data_sha256_there"]:
        return None
    answers = [answers_of(row, study) for study in (here, there)]
    if None in answers or not np.array_equal(answers[0][1], answers[1][1]):
        return None
    (ours, y), (theirs, _) = answers
    right, other = ours == y, theirs == y
    points, baseline = None, row | {"method": "fp32", "dtype": "fp32", "backend": "native"}
    fp32 = [answers_of(baseline, study) for study in (here, there)]
    if row["method"] != "fp32" and None not in fp32:
        sides = zip((right, other), fp32, strict=True)
        change = [mine.astype(int) - (base == y) for mine, (base, _) in sides]
        points = change[0] - change[1]
    only_here, only_there = int((right & ~other).sum()), int((other & ~right).sum())
    return Pair(len(y), int((ours != theirs).sum()), only_here, only_there, points)


def answers_of(row: dict, study: Study) -> tuple[np.ndarray, np.ndarray] | None:
    """Decisions and labels of a study's run on its test images; None if they are not stored."""
    path = study.folder and study.folder / "runs" / f"{results.run_id(row)}.npz"
    if path is None or not path.exists():
        return None
    with np.load(path) as stored:
        return stored["logits"].argmax(1), stored["y"]


def adjusted(pairs: list[Pair | None]) -> list[float | None]:
    """McNemar's p-values of the pairs, Holm-adjusted for their number; None without a pair."""
    tested = [pair for pair in pairs if pair is not None]
    p_values = [stats.mcnemar(pair.only_here, pair.only_there) for pair in tested]
    values = iter(stats.holm(np.array(p_values)).tolist())
    return [None if pair is None else next(values) for pair in pairs]


def of_accuracy(pair: Pair, p_value: float) -> tuple[str, str]:
    """Difference of two accuracies on the same images, as a cell, and its outcome."""
    difference = 100 * (pair.only_here - pair.only_there) / pair.n
    ends = 100 * np.array(stats.paired_difference(pair.only_here, pair.only_there, pair.n))
    outcome = ""
    if p_value < LEVEL:
        outcome = ACCURACY.more if difference > 0 else ACCURACY.less
    return with_ends(difference, ends), outcome


def of_points(pair: Pair) -> tuple[str, str]:
    """Difference of the differences to FP32, as a cell, and its outcome."""
    low, high = (100 * end for end in stats.image_interval(pair.points))
    outcome = ""
    if low > 0:
        outcome = POINTS_TO_FP32.more
    elif high < 0:
        outcome = POINTS_TO_FP32.less
    return with_ends(100 * pair.points.mean(), (low, high)), outcome


def with_ends(value: float, ends) -> str:
    """Format points with their interval."""
    middle, low, high = (number(end, POINTS) for end in (value, *ends))
    return f"{middle} [{low}, {high}]"


def in_short(pairs: list[Pair | None], p_values: list[float | None]) -> str:
    """Say how many runs were compared image by image, and how many differ; "" if none was."""
    tested = [pair for pair in pairs if pair is not None]
    if not tested:
        return ""
    raw = [stats.mcnemar(pair.only_here, pair.only_there) for pair in tested]
    differing = [pair.differing for pair in tested]
    return PAIRED.format(
        paired=len(tested),
        differ=sum(p is not None and p < LEVEL for p in p_values),
        unadjusted=sum(p < LEVEL for p in raw),
        low=min(differing),
        high=max(differing),
    )


def of_images(pairs: list[Pair | None], p_values: list[float | None]) -> dict[str, list[str]]:
    """Columns of the comparison image by image, empty where there is none."""
    cells = {"decisions differing": [], "only here": [], "only there": [], "p": []}
    for pair, p_value in zip(pairs, p_values, strict=True):
        known = pair is not None
        cells["decisions differing"].append(f"{pair.differing} of {pair.n:,}" if known else "")
        cells["only here"].append(str(pair.only_here) if known else "")
        cells["only there"].append(str(pair.only_there) if known else "")
        cells["p"].append(p_value)
    return cells | {"p": list(p_value_cells(pd.Series(cells["p"], dtype=float)))}


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


def table(both: pd.DataFrame, words: list[str], differences: dict, images: dict) -> pd.DataFrame:
    """Cells of the table."""
    seed = ", seed " + both["seed"].astype(str) if both["seed"].nunique() > 1 else ""
    return pd.DataFrame({
        "model": [catalog.MODELS[model].label for model in both["model"]],
        "variant": both["series"] + seed,
        "outcome": words,
        "accuracy %": text(100 * both["accuracy"]),
        "there %": text(100 * both["accuracy_there"]),
        "difference": differences[ACCURACY],
        **images,
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
