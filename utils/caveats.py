"""Caveats about the numbers of a row, for the terminal, tables and report. No torch."""

import functools
import re
from collections.abc import Iterable

from utils import stats

# The caveats that `of` returns, explained; {fewest} is `fewest_images` for the study's margin.
MEANING = {
    "smoke": "Smoke: a few images and steps show that the path works; the numbers measure nothing.",
    "simulated": "Simulated: 16-bit integers carried in FP32. Their speed is not valid and not "
    "given.",
    "brief": "Brief: timed for a few seconds, so times and speed-ups are rough; compile did not "
    "compete for the fastest FP32.",
    "contended": "Contended: something else was running, so do not rely on the time.",
    "converted": "Converted: timed against another FP32 engine than the study's fastest; the "
    "speed-up over the fastest is converted by the measured ratio of the two.",
    "FP16 emulated": "Emulated: this processor has no FP16 arithmetic.",
    "qnnpack off ARM": "qnnpack off ARM: shows ARM's numerics, but not its speed.",
    "timed otherwise": "Timed otherwise: only at other batch sizes or threads, so not comparable "
    "here.",
    "other processor": "Other processor: the model's FP32 run used another one. Do not compare "
    "times across processors; speed-ups are ratios on the same machine.",
    "FP32 at chance": "FP32 at chance: the baseline guesses, so the accuracy that quantization "
    "keeps means nothing.",
    "too few images": "Too few images: even identical answers would be undecided; held needs at "
    "least {fewest} test images.",
}
# Caveats about the accuracy; the others only concern the speed.
ACCURACY = ("smoke", "FP32 at chance", "too few images")


def of(row: dict) -> list[str]:
    """List the caveats of a row of results.csv, as keys of `MEANING`.

    An empty cell is None. `processor` (of the row) and `fp32_processor` (of the FP32 run that it is
    compared with) are optional.
    """
    too_few = row["margin"] is not None and row["n_test"] < fewest_images(row["margin"])
    applies = {
        "smoke": is_smoke(row),
        "simulated": row["simulated"],
        "timed otherwise": not row["simulated"] and row["latency_ms_p50"] is None,
        "brief": row.get("tier") == "brief",
        "contended": row["contended"],
        "converted": row.get("best_fp32_converted"),
        "FP16 emulated": row["native_fp16"] is not None and not row["native_fp16"],
        "qnnpack off ARM": row["backend"] == "qnnpack" and "avx2" in (row["isa"] or ""),
        "other processor": row.get("fp32_processor") not in (None, row.get("processor")),
        "FP32 at chance": fp32_at_chance(row),
        "too few images": too_few,
    }
    return [caveat for caveat, true in applies.items() if true]


def explained(caveats: Iterable[str], margin: float | None) -> list[str]:
    """Explain caveats that `of` returned, each once, in the order of `MEANING`."""
    wanted = set(caveats)
    texts = []
    for caveat, meaning in MEANING.items():
        if caveat in wanted:
            fewest = fewest_images(margin) if "{fewest}" in meaning else None
            texts.append(meaning.format(fewest=fewest))
    return texts


def is_smoke(row: dict) -> bool:
    """Whether a row comes from a smoke run; a digest of the images may follow the study's name."""
    named = re.search(r"_smoke(_[0-9a-f]{8})?$", row["study"])
    return row.get("tier") == "smoke" or named is not None


def fp32_at_chance(row: dict) -> bool:
    """Whether a row's FP32 network may be no better than a constant answer.

    This is the case if the Wilson interval of its accuracy on the same test images reaches down to
    the share of the more frequent class.
    """
    counts = [row[name] for name in ("tn", "fp", "fn", "tp")]
    if None in counts:  # only the accuracy of a network before conversion is known
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
    """Smallest test set on which a network with the answers of FP32 is `held`."""
    low, high = 1, 2
    while stats.paired_difference(0, 0, high)[0] <= -margin:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if stats.paired_difference(0, 0, middle)[0] > -margin:
            high = middle
        else:
            low = middle
    return high
