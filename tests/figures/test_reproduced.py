"""A study beside another one: what counts as reproduced, which runs are alone, and what differs around them."""

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

BASELINE, INT8, QAT = (
    ("fp32", "fp32", "native"),
    ("ptq", "int8", "fbgemm"),
    ("qat", "int8", "fbgemm"),
)
BOUNDS = ("", "_ci_low", "_ci_high")


def study(folder, *kinds, **how):
    for kind in kinds:
        write_run(folder, "resnet18", *kind, **how)
    return folder / "cats_and_dogs"


def read(folder):
    return frames.read(folder / "results.csv")


def changed(frame, backend, **values):
    frame = frame.astype({"size_mb": float})
    for name, value in values.items():
        frame.loc[frame["backend"] == backend, name] = value
    return frame


def test_a_study_reproduces_itself(tmp_path):
    frame = read(study(tmp_path, BASELINE, INT8))
    note, cells = reproduced.beside(frame, frame, "mine", "theirs")
    assert list(cells["outcome"]) == ["reproduced"] * 2
    assert "Runs in both: 2. Inside the intervals: accuracy 2 of 2, points to FP32 1 of 1, " in note
    assert (
        "size 2 of 2" in note
        and "Only" not in note
        and note.endswith("What differs: nothing that results.csv tells.")
    )


@pytest.mark.parametrize(("values", "outcome"), [
    (dict(accuracy=0.5, accuracy_ci_low=0.4, accuracy_ci_high=0.6), "accuracy lower"),
    (dict(accuracy_difference=-0.5, accuracy_difference_ci_low=-0.6, accuracy_difference_ci_high=-0.4), "loses more"),
    (dict(accuracy_difference=0.5, accuracy_difference_ci_low=0.4, accuracy_difference_ci_high=0.6), "loses less"),
    (dict(speedup_vs_eager_fp32=9.0, speedup_vs_eager_fp32_ci_low=8.5, speedup_vs_eager_fp32_ci_high=9.5), "gains more speed"),
    (dict(speedup_vs_eager_fp32=1.0, speedup_vs_eager_fp32_ci_low=0.9, speedup_vs_eager_fp32_ci_high=1.1), "gains less speed"),
    (dict(size_mb=9.0), "larger file"), (dict(size_mb=3.9), "smaller file"), (dict(size_mb=4.03), "reproduced"),
    (dict(size_mb=9.0, speedup_vs_eager_fp32=1.0, speedup_vs_eager_fp32_ci_low=0.9, speedup_vs_eager_fp32_ci_high=1.1),
     "gains less speed; larger file"),
])  # fmt: skip
def test_what_is_outside_its_interval_is_said(tmp_path, values, outcome):
    there = read(study(tmp_path, BASELINE, INT8))
    _, cells = reproduced.beside(changed(there, "fbgemm", **values), there, "mine", "theirs")
    assert list(cells["outcome"]) == ["reproduced", outcome]


def test_the_intervals_by_hand(tmp_path):
    frame = read(study(tmp_path, BASELINE))
    accuracy = dict(zip([f"accuracy{end}" for end in BOUNDS], (0.9, 0.88, 0.91), strict=True))
    other = dict(zip([f"accuracy{end}" for end in BOUNDS], (0.95, 0.92, 0.96), strict=True))
    speed = dict(
        zip([f"speedup_vs_eager_fp32{end}" for end in BOUNDS], (2.0, 1.0, 4.0), strict=True)
    )
    others = dict(
        zip([f"speedup_vs_eager_fp32{end}" for end in BOUNDS], (1.0, 0.5, 2.0), strict=True)
    )
    here, there = (
        changed(frame, "native", **accuracy, **speed),
        changed(frame, "native", **other, **others),
    )
    row = reproduced.beside(here, there, "mine", "theirs")[1].iloc[0]
    # 0.02 below and 0.01 above of ours, 0.01 above and 0.03 below of theirs
    low, high = -5 - 100 * np.hypot(0.02, 0.01), -5 + 100 * np.hypot(0.01, 0.03)
    assert row["difference"] == f"-5.00 [{low:+.2f}, {high:+.2f}]"
    ends = (
        2 * 2.0 ** -np.sqrt(2),
        2 * 2.0 ** np.sqrt(2),
    )  # both are 2 times as large or small at their bounds
    assert row["ratio"] == f"2.000 [{ends[0]:.3f}, {ends[1]:.3f}]"
    assert (row["accuracy %"], row["there %"]) == ("90.00", "95.00")


def test_runs_of_one_side_are_named_with_their_seeds_where_there_are_several(tmp_path):
    here = read(study(tmp_path / "a", BASELINE))
    there = read(study(tmp_path / "b", BASELINE, INT8))
    there = pd.concat([there, there.assign(seed=1)])
    note, _ = reproduced.beside(here, there, "mine", "theirs")
    assert (
        "Only there: ResNet-18 FP32 native of seed 1, ResNet-18 INT8 PTQ fbgemm of seed 0, ResNet-18 INT8 PTQ"
        in note
    )


def test_independent_intervals_that_are_equal_on_both_sides_add_up_as_squares():
    assert stats.difference((3.0, 2.7, 3.3), (1.0, 0.6, 1.4)) == pytest.approx((1.5, 2.5))


def test_runs_of_one_side_and_what_differs_are_named(tmp_path):
    here = changed(read(study(tmp_path / "a", BASELINE, INT8)), "native", torch="2.14.0").assign(
        data_sha256="b" * 64
    )
    there = read(study(tmp_path / "b", BASELINE, QAT, threads=(1, 4), cpu="another"))
    note, cells = reproduced.beside(here, there, "mine", "theirs")
    assert list(cells["variant"]) == ["FP32 native"]
    assert (
        "Only here: ResNet-18 INT8 PTQ fbgemm. Only there: ResNet-18 INT8 QAT fbgemm. What differs: "
        in note
    )
    for words in (
        f"images {'b' * 10} here, {'a' * 10} there", "torch 2.13.0 and 2.14.0 here, 2.13.0 there",
        "processor a processor here, another there", "threads 1 and 2 here, 1 and 4 there",
    ):  # fmt: skip
        assert words in note
    assert "batch size" not in note and "commit" not in note


def test_processors_of_one_name_differ_by_their_instruction_sets(tmp_path):
    here = read(study(tmp_path / "a", BASELINE, INT8))
    there = here.assign(isa="avx2 avx512f")
    note, _ = reproduced.beside(here, there, "mine", "theirs")
    (name,), (isa,) = set(here["cpu"]), set(here["isa"])
    assert f"processor {name} with {isa} here, {name} with avx2 avx512f there" in note


def test_studies_without_a_common_run_are_told(tmp_path):
    with pytest.raises(UserError, match=r"mine and theirs have no run in common"):
        reproduced.beside(
            read(study(tmp_path / "a", INT8)), read(study(tmp_path / "b", QAT)), "mine", "theirs"
        )


def script(*options, cwd):
    command = [
        sys.executable,
        paths.ROOT / "figures" / "tables.py",
        "--study",
        "cats_and_dogs",
        *options,
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_script_writes_the_table_and_prints_it_first(tmp_path):
    study(tmp_path / "mine", BASELINE, INT8)
    folder = study(tmp_path / "theirs", BASELINE, INT8)
    done = script("--results", "mine", "--against", "theirs/cats_and_dogs", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        r"## Beside theirs/cats_and_dogs\n\nHere: cats_and_dogs; there: theirs/cats_and_dogs\.",
        done.stdout,
    )
    rows = list(csv.DictReader((tmp_path / "mine/cats_and_dogs/tables/against.csv").open()))
    assert [row["outcome"] for row in rows] == ["reproduced", "reproduced"]
    assert (
        folder.exists() and not (folder / "tables").exists()
    )  # nothing is written beside the other
    done = script("--results", "mine", "--against", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(
        r"error: figures/tables.py: there is no mine/nowhere/results.csv.*\n", done.stderr
    )
