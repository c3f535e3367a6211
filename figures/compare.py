"""Tables of differences between two networks: QAT and PTQ image by image, ours and the dissertation's. No torch."""

from collections import Counter
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import published
import style
from cells import POINTS, RATIO, number, p_value, percent, text, with_interval

from utils import stats
from utils.errors import UserError

PAIRS = (("qat", "ptq"), ("qat", "control"), ("ptq", "control"))
PUBLISHED_IMAGES = 2000  # test images behind the dissertation's accuracies
GAIN = (
    "Accuracy of the first minus that of the second, in points, on the same images (paired bootstrap interval). The control is "
    "FP32 fine-tuned as QAT is: what more training alone gives. p: exact McNemar test, after Holm over this table."
)


def gain(own: pd.DataFrame, runs: Path) -> pd.DataFrame:
    """QAT minus PTQ of a model's dtype and engine, and each minus the control, as far as they were run, of one seed and device.

    Both sides answered the same images, so the interval is a paired one: `stats.against` asks `stats.paired_difference` and
    `stats.mcnemar` about the images that only one of them gets right, found in the logits and labels beside the runs' JSONs.
    """
    key = ["dtype", "backend", "device", "seed"]
    found = own.set_index(["method", *key])["run"].to_dict()
    quantized = own[own["method"].isin(["ptq", "qat"])].drop_duplicates(key).sort_values(key)
    rows = []
    for _, row in quantized.iterrows():
        same = row["device"], row["seed"]
        sides = {method: found.get((method, row["dtype"], row["backend"], *same)) for method in ("ptq", "qat")}
        sides["control"] = found.get(("control", "fp32", "native", *same))
        for pair in PAIRS:
            if all(sides[side] for side in pair):
                names = " minus ".join(style.METHODS[side] for side in pair)
                variant = row["variant"].replace(" PTQ", "").replace(" QAT", "")
                first, second = (runs / f"{sides[side]}.npz" for side in pair)
                rows.append({"variant": variant, "difference": names, **decisions(first, second)})
    return gain_cells(pd.DataFrame(rows)) if rows else pd.DataFrame()


def gain_cells(found: pd.DataFrame) -> pd.DataFrame:
    """The differences as strings, their p-values adjusted for as many tests as there are."""
    return pd.DataFrame({
        "variant": found["variant"],
        "difference": found["difference"],
        "first %": percent(found["first"]),
        "second %": percent(found["second"]),
        "points": with_interval(found, "accuracy_difference", POINTS, 100),
        "only first right": text(found["gained"], "{}"),
        "only second right": text(found["lost"], "{}"),
        "p": p_value(pd.Series(stats.holm(found["mcnemar_p"].to_numpy()))),
    })  # fmt: skip


def decisions(first: Path, second: Path) -> dict:
    """Accuracy of two runs, and how the decisions of the first compare with those of the second."""
    (logits, y), (other, other_y) = stored(first), stored(second)
    if not np.array_equal(y, other_y):
        raise UserError(f"{first.name} and {second.name} are about other test images; run the older one's script again.")
    right, other_right = logits.argmax(1) == y, other.argmax(1) == y
    return {"first": right.mean(), "second": other_right.mean()} | stats.against(right, other_right)


def stored(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a run."""
    try:
        with np.load(path) as content:
            return content["logits"], content["y"]
    except (OSError, ValueError, KeyError, BadZipFile):
        raise UserError(f"{path} is missing or damaged; run its script again.") from None


def against_published(one: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """What the table of the dissertation's figures says of itself, and its cells: a row for each of its rows."""
    cells = pd.DataFrame([beside(row, published.match(row, one)) for _, row in published.load().iterrows()])
    counts = Counter(cells["verdict"])
    found = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    note = (
        f"Every row of the dissertation's tables: {found}. Points: ours minus published; reproduced: the interval contains 0. It "
        f"is of independent shares (Newcombe), the published one of {PUBLISHED_IMAGES:,} images, and covers which images were "
        "tested, neither another training nor the number of rows. Much of a difference is how well the FP32 network behind it "
        "was trained; the reason says what quantization itself changed in ours. x: times faster than eager FP32 on a CPU, ours "
        "at the smallest batch size timed. Figures of a GPU are not compared."
    )
    return note, cells


def beside(row: pd.Series, ours: pd.Series | None) -> dict[str, str]:
    """A published row and our run, if there is one, as cells."""
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
    points, low, high = difference(ours, row["accuracy_pct"])
    timed = pd.notna(row["cpu_speedup"]) and ours["device"] == "cpu"
    return cells | {
        "ours": ours["series"],
        "ours %": number(100 * ours["accuracy"]),
        "points": f"{points:+.2f} [{low:+.2f}, {high:+.2f}]",
        "verdict": "higher here" if low > 0 else "lower here" if high < 0 else "reproduced",
        "ours x": number(ours["speedup_vs_eager_fp32"], RATIO) if timed else "",
        "ours MiB": number(ours["size_mb"]) if pd.notna(row["size_mb"]) else "",
    }


def label(row: pd.Series, *more: str) -> str:
    """A published row's model, and its own label."""
    return f"{style.MODELS[row['model']]} {published.label(row, *more)}"


def difference(ours: pd.Series, published_pct: float) -> tuple[float, float, float]:
    """Our accuracy minus the published one in points, with its interval.

    Some published accuracies are no whole number of images; the interval is that of the nearest one.
    """
    n = int(ours["n_test"])
    theirs = round(published_pct / 100 * PUBLISHED_IMAGES)
    low, high = stats.newcombe(round(ours["accuracy"] * n), n, theirs, PUBLISHED_IMAGES)
    points = round(100 * ours["accuracy"] - published_pct, 6) + 0.0  # the sum makes 0 of -0
    return points, 100 * low, 100 * high


def remarks(row: pd.Series, ours: pd.Series | None) -> list[str]:
    """What this study can say about a published row."""
    if ours is None:
        variant = label(row, row["backend_here"])
        reason = "TensorRT needs an NVIDIA GPU" if row["backend_here"] == "tensorrt" else f"{variant} is not in this study"
        return [f"not run: {reason}"]
    speeds = row.filter(regex="latency|throughput|speedup").dropna().index
    fast, emulated = pd.notna(row["cpu_speedup"]), pd.notna(ours["native_fp16"]) and not ours["native_fp16"]
    said = {
        "ours: all of a model start from one FP32 network": ours["method"] == "fp32",
        f"ours: {100 * ours['accuracy_difference']:+.2f} points to its own FP32 ({ours['verdict']})": pd.notna(ours["verdict"]),
        "the published speed is a GPU's": len(speeds) > 0 and speeds.str.startswith("gpu").all(),
        "ours: no speed, as simulated": fast and ours["simulated"],
        "ours: FP16 emulated": fast and emulated,
        "ours: contended": fast and pd.notna(ours["contended"]) and ours["contended"],
    }
    return [text for text, holds in said.items() if holds]
