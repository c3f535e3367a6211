"""Caveats on a row's numbers, for the terminal, the tables and the report. No torch."""

import functools
import re
from collections.abc import Iterable

from utils import stats

MEANING = {  # of the words that `of` returns; {fewest} is `fewest_images` for the study's margin
    "smoke": "Smoke: a few images and steps show that the path works; the numbers measure nothing.",
    "simulated": "Simulated: 16-bit integers carried in FP32, whose speed says nothing; none is given.",
    "brief": "Brief: timed for a few seconds, so times and speed-ups are rough; the fastest FP32 is searched without compile.",
    "contended": "Contended: something else was running, so do not rely on the time.",
    "FP16 emulated": "Emulated: this processor has no FP16 arithmetic.",
    "qnnpack off ARM": "qnnpack off ARM: stands for ARM's numerics, not for its speed.",
    "timed otherwise": "Timed otherwise: at other batch sizes or threads only, not comparable here.",
    "other processor": "Other processor: not that of the model's FP32 run. Do not compare times of different processors; "
    "speed-ups are ratios on the same machine.",
    "FP32 at chance": "FP32 at chance: the baseline guesses, so what quantization keeps of it means nothing.",
    "too few images": "Too few images: even identical answers would be undecided; held needs at least {fewest} test images.",
}
ACCURACY = (
    "smoke",
    "FP32 at chance",
    "too few images",
)  # these concern the accuracy, the others only the speed


def of(row: dict) -> list[str]:
    """List the caveats of a row of results.csv, by the words that MEANING explains.

    An empty cell is None. `processor` and `fp32_processor`, those of the row and of the FP32 run
    that it is compared with, may be left out.
    """
    holds = {
        "smoke": is_smoke(row),
        "simulated": row["simulated"],
        "timed otherwise": not row["simulated"] and row["latency_ms_p50"] is None,
        "brief": row.get("tier") == "brief",
        "contended": row["contended"],
        "FP16 emulated": row["native_fp16"] is not None and not row["native_fp16"],
        "qnnpack off ARM": row["backend"] == "qnnpack" and "avx2" in (row["isa"] or ""),
        "other processor": row.get("fp32_processor") not in (None, row.get("processor")),
        "FP32 at chance": fp32_at_chance(row),
        "too few images": row["margin"] is not None
        and row["n_test"] < fewest_images(row["margin"]),
    }
    return [words for words, true in holds.items() if true]


def explained(words: Iterable[str], margin: float | None) -> list[str]:
    """Explain each of the words that `of` returns once, in the order of MEANING."""
    words = set(words)
    meanings = [meaning for name, meaning in MEANING.items() if name in words]
    return [
        text.format(fewest=fewest_images(margin)) if "{fewest}" in text else text
        for text in meanings
    ]


def is_smoke(row: dict) -> bool:
    """Whether a row is of a smoke run; the study's name may end in a digest of its images."""
    return (
        row.get("tier") == "smoke" or re.search(r"_smoke(_[0-9a-f]{8})?$", row["study"]) is not None
    )


def fp32_at_chance(row: dict) -> bool:
    """Whether the FP32 network of a row may be no better than always giving the frequent class.

    That is so where the Wilson interval of its accuracy on the same test images reaches down to the
    share of the more frequent class.
    """
    counts = [row[name] for name in ("tn", "fp", "fn", "tp")]
    if None in counts:  # of a network before conversion only the accuracy is known
        return False
    n = int(row["n_test"])
    right = round(n * (row["accuracy"] - (row["accuracy_difference"] or 0.0)))
    tn, fp, fn, tp = counts
    return _lower_bound(right, n) <= max(tn + fp, fn + tp) / n


@functools.cache
def _lower_bound(right: int, n: int) -> float:
    """Lower end of the Wilson interval of a share."""
    return stats.wilson(right, n)[0]


@functools.cache
def fewest_images(margin: float) -> int:
    """Smallest test set on which a network that answers as FP32 does is `held`."""
    low, high = 1, 2
    while stats.paired_difference(0, 0, high)[0] <= -margin:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if stats.paired_difference(0, 0, middle)[0] > -margin else (middle, high)
        )
    return high
