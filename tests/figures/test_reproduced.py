"""Two studies: what counts as reproduced, which runs are in one only, and what differs."""

import csv
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from records import write_run

from figures.shared import frames, reproduced
from utils import paths, stats
from utils.errors import UserError

BASELINE = ("fp32", "fp32", "native")
INT8 = ("ptq", "int8", "fbgemm")
QAT = ("qat", "int8", "fbgemm")


def interval(column, middle, low, high):
    """Columns of a number and its interval."""
    return {column: middle, f"{column}_ci_low": low, f"{column}_ci_high": high}


LESS_ACCURATE = interval("accuracy", 0.5, 0.4, 0.6)
LOSES_MORE = interval("accuracy_difference", -0.5, -0.6, -0.4)
LOSES_LESS = interval("accuracy_difference", 0.5, 0.4, 0.6)
FASTER = interval("speedup_vs_eager_fp32", 9.0, 8.5, 9.5)
SLOWER = interval("speedup_vs_eager_fp32", 1.0, 0.9, 1.1)


def study(folder, *kinds, **how):
    for kind in kinds:
        write_run(folder, "resnet18", *kind, **how)
    return folder / "cats_and_dogs"


def compare(here, there, *folders):
    """Compare two frames as studies; without `folders`, no image can be compared."""
    folders = folders or (None, None)
    return reproduced.comparison(
        reproduced.Study("mine", here, folders[0]), reproduced.Study("theirs", there, folders[1])
    )


def read(folder):
    return frames.read(folder / "results.csv")


def changed(frame, backend, **values):
    frame = frame.astype({"size_mb": float})
    for name, value in values.items():
        frame.loc[frame["backend"] == backend, name] = value
    return frame


def test_a_study_reproduces_itself(tmp_path):
    frame = read(study(tmp_path, BASELINE, INT8))
    note, cells = compare(frame, frame)
    assert list(cells["outcome"]) == ["reproduced"] * 2
    assert "Runs in both: 2. Inside the intervals: accuracy 2 of 2, points to FP32 1 of 1, " in note
    assert "size 2 of 2" in note and "Only" not in note
    assert note.endswith("What differs: nothing that results.csv tells.")


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        (LESS_ACCURATE, "accuracy lower"),
        (LOSES_MORE, "loses more"),
        (LOSES_LESS, "loses less"),
        (FASTER, "gains more speed"),
        (SLOWER, "gains less speed"),
        (dict(size_mb=9.0), "larger file"),
        (dict(size_mb=3.9), "smaller file"),
        (dict(size_mb=4.03), "reproduced"),
        (SLOWER | dict(size_mb=9.0), "gains less speed; larger file"),
    ],
)
def test_a_number_outside_its_interval_is_named(tmp_path, values, outcome):
    there = read(study(tmp_path, BASELINE, INT8))
    _, cells = compare(changed(there, "fbgemm", **values), there)
    assert list(cells["outcome"]) == ["reproduced", outcome]


def test_the_intervals_by_hand(tmp_path):
    frame = read(study(tmp_path, BASELINE))
    accuracy, speed = "accuracy", "speedup_vs_eager_fp32"
    ours = interval(accuracy, 0.9, 0.88, 0.91) | interval(speed, 2.0, 1.0, 4.0)
    theirs = interval(accuracy, 0.95, 0.92, 0.96) | interval(speed, 1.0, 0.5, 2.0)
    here, there = changed(frame, "native", **ours), changed(frame, "native", **theirs)
    row = compare(here, there)[1].iloc[0]
    # Ours reaches 0.02 below and 0.01 above, theirs 0.03 below and 0.01 above.
    low, high = -5 - 100 * np.hypot(0.02, 0.01), -5 + 100 * np.hypot(0.01, 0.03)
    assert row["difference"] == f"-5.00 [{low:+.2f}, {high:+.2f}]"
    # The bounds of both ratios are 2 times as large and half as large.
    low, high = 2 * 2.0 ** -np.sqrt(2), 2 * 2.0 ** np.sqrt(2)
    assert row["ratio"] == f"2.000 [{low:.3f}, {high:.3f}]"
    assert (row["accuracy %"], row["there %"]) == ("90.00", "95.00")


def test_runs_of_one_side_are_named_with_their_seeds_if_there_are_several(tmp_path):
    here = read(study(tmp_path / "a", BASELINE))
    there = read(study(tmp_path / "b", BASELINE, INT8))
    there = pd.concat([there, there.assign(seed=1)])
    note, _ = compare(here, there)
    assert (
        "Only there: ResNet-18 FP32 native of seed 1, ResNet-18 INT8 PTQ fbgemm of seed 0, "
        "ResNet-18 INT8 PTQ"
    ) in note


def test_independent_intervals_that_are_equal_on_both_sides_add_up_as_squares():
    assert stats.difference((3.0, 2.7, 3.3), (1.0, 0.6, 1.4)) == pytest.approx((1.5, 2.5))


def test_runs_of_one_side_and_what_differs_are_named(tmp_path):
    here = changed(read(study(tmp_path / "a", BASELINE, INT8)), "native", torch="2.14.0")
    here = here.assign(data_sha256="b" * 64)
    there = read(study(tmp_path / "b", BASELINE, QAT, threads=(1, 4), cpu="another"))
    note, cells = compare(here, there)
    assert list(cells["variant"]) == ["FP32 native"]
    assert "Only here: ResNet-18 INT8 PTQ fbgemm. Only there: ResNet-18 INT8 QAT fbgemm. " in note
    _, _, differences = note.partition(". What differs: ")
    for words in (
        f"images {'b' * 10} here, {'a' * 10} there",
        "torch 2.13.0 and 2.14.0 here, 2.13.0 there",
        "processor a processor here, another there",
        "threads 1 and 2 here, 1 and 4 there",
    ):
        assert words in differences
    assert "batch size" not in note and "commit" not in note


def test_processors_of_one_name_differ_by_their_instruction_sets(tmp_path):
    here = read(study(tmp_path / "a", BASELINE, INT8))
    there = here.assign(isa="avx2 avx512f")
    note, _ = compare(here, there)
    (name,), (isa,) = set(here["cpu"]), set(here["isa"])
    assert f"processor {name} with {isa} here, {name} with avx2 avx512f there" in note


def test_studies_without_a_common_run_are_told(tmp_path):
    here, there = read(study(tmp_path / "a", INT8)), read(study(tmp_path / "b", QAT))
    with pytest.raises(UserError, match=r"mine and theirs have no run in common"):
        compare(here, there)


def script(*options, cwd):
    command = [sys.executable, paths.FIGURES / "tables.py", "--study", "cats_and_dogs", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_script_writes_the_table_and_prints_it_first(tmp_path):
    study(tmp_path / "mine", BASELINE, INT8)
    folder = study(tmp_path / "theirs", BASELINE, INT8)
    done = script("--results", "mine", "--against", "theirs/cats_and_dogs", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    title = "## Next to theirs/cats_and_dogs"
    note = "Here: cats_and_dogs; there: theirs/cats_and_dogs."
    assert f"{title}\n\n{note}" in done.stdout
    rows = list(csv.DictReader((tmp_path / "mine/cats_and_dogs/tables/against.csv").open()))
    assert [row["outcome"] for row in rows] == ["reproduced", "reproduced"]
    # The other study stays as it is.
    assert folder.exists() and not (folder / "tables").exists()
    done = script("--results", "mine", "--against", "nowhere", cwd=tmp_path)
    message = r"error: figures/tables.py: there is no mine/nowhere/results.csv.*\n"
    assert done.returncode == 2 and re.fullmatch(message, done.stderr)


# ---- image by image


def answered(folder, right, kind=INT8, images="a" * 64):
    """Store the answers of a run: `right` tells on which images they are correct."""
    path = study(folder, kind, images=len(right)) / "runs" / f"resnet18_{NAMES[kind]}_cpu_seed0.npz"
    y = np.arange(len(right)) % 2
    decisions = np.where(right, y, 1 - y)
    np.savez(path, logits=np.eye(2, dtype=np.float32)[decisions], y=y)
    return path.parents[1]


NAMES = {INT8: "ptq_int8_fbgemm", BASELINE: "fp32_native"}


def test_answers_to_the_same_images_are_compared_image_by_image(tmp_path):
    """Both are right on 360 of 400 images, and 30 images are those that only one gets right."""
    ours, theirs = np.ones(400, bool), np.ones(400, bool)
    ours[:40], theirs[:10], theirs[30:60] = False, False, False  # 20 only theirs, 20 only ours
    here, there = (answered(tmp_path / str(n), right) for n, right in enumerate((ours, theirs)))
    note, cells = compare(read(here), read(there), here, there)
    row = cells.iloc[0]
    assert (row["decisions differing"], row["only here"], row["only there"]) == (
        "40 of 400", "20", "20",
    )  # fmt: skip
    assert row["p"] == "1.000" and row["outcome"].count("accuracy") == 0
    low, high = (100 * end for end in stats.paired_difference(20, 20, 400))
    assert row["difference"] == f"+0.00 [{low:+.2f}, {high:+.2f}]"
    assert "1 of these runs answered the same images" in note
    assert "the accuracy of 0 differs" in note and "40 to 40 decisions differ" in note


def test_a_difference_that_independent_samples_hide_is_seen(tmp_path):
    """20 images that only theirs gets right of 400: 90 and 95 %, whose intervals overlap."""
    ours, theirs = np.ones(400, bool), np.ones(400, bool)
    ours[:40], theirs[:20] = False, False
    here, there = (answered(tmp_path / str(n), right) for n, right in enumerate((ours, theirs)))
    note, cells = compare(read(here), read(there), here, there)
    assert "accuracy lower" in cells["outcome"].iloc[0] and cells["p"].iloc[0] == "<0.001"
    assert "the accuracy of 1 differs" in note


def test_p_values_are_adjusted_for_the_runs_compared():
    pairs = [reproduced.Pair(400, 9, 8, 1, None), None, *[reproduced.Pair(400, 0, 0, 0, None)] * 3]
    values = reproduced.adjusted(pairs)
    assert values[1] is None
    assert values[0] == pytest.approx(4 * stats.mcnemar(8, 1))
    assert stats.mcnemar(8, 1) < 0.05 < values[0]
    assert "of 0 differs" in reproduced.in_short(pairs, values)
    assert "of 1 before the adjustment" in reproduced.in_short(pairs, values)


def test_other_images_are_compared_as_independent_samples(tmp_path):
    right = np.arange(400) % 10 > 0
    here, there = (answered(tmp_path / str(n), right) for n in range(2))
    for frames_of in (
        (read(here).assign(data_sha256="b" * 64), read(there), here, there),
        (read(here), read(there)),
    ):
        note, cells = compare(*frames_of)
        assert cells["decisions differing"].tolist() == [""]
        assert "image by image" not in note and "independent samples" in note


def test_points_to_fp32_are_compared_image_by_image_as_well(tmp_path):
    fp32 = np.arange(400) % 10 > 0
    loses = fp32.copy()
    loses[:30] = False
    for n, right in enumerate((loses, fp32)):
        folder = answered(tmp_path / str(n), fp32, BASELINE)
        assert answered(tmp_path / str(n), right) == folder
    here, there = (tmp_path / str(n) / "cats_and_dogs" for n in range(2))
    _, cells = compare(read(here), read(there), here, there)
    row = cells[cells["variant"] != "FP32 native"].iloc[0]
    assert "loses more" in row["outcome"]
    values = loses.astype(int) - fp32
    low, high = (100 * end for end in stats.image_interval(values))
    assert row["difference of points"] == f"{100 * values.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
