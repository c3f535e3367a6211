"""Differences between two networks: QAT and PTQ image by image, ours and published ones.

No torch.
"""

if __name__ == "__main__":
    import no_script  # noqa: F401

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from figures.shared import published, runs
from figures.shared.cells import POINTS, RATIO, number, p_value, percent, plain, text, with_interval
from utils import catalog, caveats, stats
from utils.errors import UserError

PAIRS = (("qat", "ptq"), ("qat", "control"), ("ptq", "control"))
GAIN = (
    "Accuracy of the first minus accuracy of the second, in points, on the same images (paired "
    "bootstrap interval). The control is FP32 fine-tuned like QAT: it shows what additional "
    "training alone gains. p: exact McNemar test, Holm-adjusted over this table."
)
PUBLISHED = (
    "Verdicts on the {rows} rows of the dissertation's tables: {counts}. Points: ours minus "
    "published; reproduced: the interval contains 0; {other}: the published figure does not "
    "measure what the row names, see the reason. The interval is for independent shares "
    "(Newcombe), the published one on the number of images that its script counted (2,000 in most "
    "rows). It covers the choice of test images, but neither another training nor the number of "
    "rows. Much of a difference comes from how well the FP32 network was trained; the reason says "
    "what quantization itself changed in ours. x: times faster than eager FP32 on a CPU, ours at "
    "the smallest timed batch size. GPU figures are not compared."
)


def gain(frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Compare QAT, PTQ and the control in pairs, if they were run.

    `frame` has one row per run of one model. Both sides have the same deployment, seed and device.
    They answered the same images, so the interval is paired; it is computed from the logits and
    labels in `folder`.
    """
    key = ["dtype", "backend", "device", "seed"]
    names = frame.set_index(["method", *key])["run"].to_dict()
    quantized = frame[frame["method"].isin(["ptq", "qat"])].drop_duplicates(key).sort_values(key)
    rows = []
    for _, row in quantized.iterrows():
        same = row["device"], row["seed"]
        deployed = row["dtype"], row["backend"], *same
        sides = {method: names.get((method, *deployed)) for method in ("ptq", "qat")}
        sides["control"] = names.get(("control", "fp32", "native", *same))
        for first, second in PAIRS:
            if sides[first] and sides[second]:
                labels = (catalog.METHODS[method].label for method in (first, second))
                described = {"variant": row["deployed"], "difference": " minus ".join(labels)}
                files = (folder / f"{sides[method]}.npz" for method in (first, second))
                rows.append(described | decisions(*files))
    return gain_cells(pd.DataFrame(rows)) if rows else pd.DataFrame()


def gain_cells(differences: pd.DataFrame) -> pd.DataFrame:
    """Format the differences, with p-values adjusted for the number of tests."""
    return pd.DataFrame({
        "variant": differences["variant"],
        "difference": differences["difference"],
        "first %": percent(differences["first"]),
        "second %": percent(differences["second"]),
        "points": with_interval(differences, "accuracy_difference", POINTS, 100),
        "only first right": text(differences["gained"], "{}"),
        "only second right": text(differences["lost"], "{}"),
        "p": p_value(pd.Series(stats.holm(differences["mcnemar_p"].to_numpy()))),
    })  # fmt: skip


def decisions(first: Path, second: Path) -> dict:
    """Accuracy of two runs, and the decisions of the first against the second."""
    (logits, y), (other, other_y) = runs.answers(first), runs.answers(second)
    if not np.array_equal(y, other_y):
        raise UserError(
            f"{first.name} and {second.name} are about other test images; run the older one's "
            "script again."
        )
    right, other_right = logits.argmax(1) == y, other.argmax(1) == y
    return {"first": right.mean(), "second": other_right.mean()} | stats.against(right, other_right)


def against_published(one: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Note and cells of the table with the dissertation's rows."""
    cells = pd.DataFrame(
        [line(row, published.match(row, one)) for _, row in published.load().iterrows()]
    )
    counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(cells["verdict"]).most_common())
    return PUBLISHED.format(rows=len(cells), counts=counts, other=published.ELSE), cells


def line(row: pd.Series, ours: pd.Series | None) -> dict[str, str]:
    """Format a published row and our run, if there is one."""
    cells = {
        "table": row["table"],
        "published": label(row, row["variant"], row["backend"]),
        "ours": "",
        "published %": number(row["accuracy_pct"]),
        "ours %": "",
        "points": "",
        "verdict": "not run",
        "published x": number(row["cpu_speedup"], "{:g}"),
        "ours x": "",
        "published MiB": number(row["size_mb"], "{:g}"),
        "ours MiB": "",
        "reason": "; ".join([row["remark"], *remarks(row, ours)]),
    }
    if ours is None:
        return cells
    points, low, high = difference(ours, row["accuracy_pct"], row["images"])
    verdict = "reproduced"
    if row["measured"] == published.ELSE:
        verdict = published.ELSE
    elif low > 0:
        verdict = "higher here"
    elif high < 0:
        verdict = "lower here"
    timed = pd.notna(row["cpu_speedup"]) and ours["device"] == "cpu"
    return cells | {
        "ours": ours["series"],
        "ours %": number(100 * ours["accuracy"]),
        "points": f"{points:+.2f} [{low:+.2f}, {high:+.2f}]",
        "verdict": verdict,
        "ours x": number(ours["speedup_vs_eager_fp32"], RATIO) if timed else "",
        "ours MiB": number(ours["size_mb"]) if pd.notna(row["size_mb"]) else "",
    }


def label(row: pd.Series, *more: str) -> str:
    """Name a published row with its model."""
    return f"{catalog.MODELS[row['model']].label} {published.label(row, *more)}"


def difference(ours: pd.Series, published_pct: float, images: int) -> tuple[float, float, float]:
    """Difference of our accuracy and a published one in points, with its interval.

    The published accuracy is on `images` images. Not every one is a whole number of them: the
    interval is for the nearest whole number.
    """
    n = int(ours["n_test"])
    theirs = round(published_pct / 100 * images)
    low, high = stats.newcombe(round(ours["accuracy"] * n), n, theirs, images)
    points = round(100 * ours["accuracy"] - published_pct, 6) + 0.0  # adding 0 turns -0 into 0
    return points, 100 * low, 100 * high


def remarks(row: pd.Series, ours: pd.Series | None) -> list[str]:
    """List what this study can say about a published row.

    Caveats about the speed only count if a speed was published.
    """
    if ours is None:
        reason = f"{label(row, row['backend_here'])} is not in this study"
        if row["backend_here"] == "tensorrt":
            reason = "TensorRT needs an NVIDIA GPU"
        return [f"not run: {reason}"]
    said = []
    if ours["method"] == "fp32":
        said.append("ours: all variants of a model start from one FP32 network")
    if pd.notna(ours["verdict"]):
        points = 100 * ours["accuracy_difference"]
        said.append(f"ours: {points:+.2f} points to its FP32 ({ours['verdict']})")
    speeds = row.filter(regex="latency|throughput|speedup").dropna().index
    if len(speeds) and speeds.str.startswith("gpu").all():
        said.append("the published speed is a GPU's")
    for caveat in caveats.of(plain(ours.to_dict())):
        if pd.notna(row["cpu_speedup"]) or caveat in caveats.ACCURACY:
            said.append(f"ours: {'no speed, as simulated' if caveat == 'simulated' else caveat}")
    return said
