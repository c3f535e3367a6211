"""The tables script on results made up for it."""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
import style
import tables


def results(tmp_path, *rows):
    given = dict(study="x", method="ptq", dtype="int8", backend="fbgemm", device="cpu", simulated=False, threads=2, batch_size=1)
    path = tmp_path / "x/results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([given | row for row in rows]).to_csv(path, index=False)
    return style.read(path)


def test_seeds_make_mean_and_spread(tmp_path):
    rows = [dict(model="resnet18", seed=seed, accuracy=value) for seed, value in enumerate((0.97, 0.98, 0.975))]
    rows += [dict(model="alexnet", seed=0, accuracy=0.9)]
    (row,) = tables.over_seeds(results(tmp_path, *rows)).to_dict("records")
    expected = {"variant": "INT8 PTQ fbgemm", "seeds": 3, "mean": "97.50", "std": "0.50", "min": "97.00", "max": "98.00"}
    assert row == {"model": "ResNet-18"} | expected


def test_one_seed_has_no_spread(tmp_path):
    assert tables.over_seeds(results(tmp_path, dict(model="resnet18", seed=0, accuracy=0.9))) is None


def test_the_baseline_comes_first_and_simulated_runs_say_so(tmp_path):
    rows = [
        dict(method="ptq", dtype="int16", backend="simulated", simulated=True, batch_size=None),
        dict(method="control", dtype="fp32", backend="native"),
        dict(method="fp32", dtype="fp32", backend="native"),
    ]
    frame = results(tmp_path, *[dict(model="resnet18", seed=0, accuracy=0.9) | row for row in rows])
    assert frame["series"].tolist() == ["FP32 native", "FP32 control native", "INT16 PTQ simulated"]
    one, batch = style.one_batch(frame)
    assert (len(one), batch) == (3, 1)


def test_a_table_lines_up():
    table = tables.markdown(pd.DataFrame({"a": ["x", "longer"], "b": ["1", "22"]}))
    assert table.splitlines() == ["| a      | b  |", "| ------ | -- |", "| x      | 1  |", "| longer | 22 |"]


@pytest.mark.parametrize(("value", "text"), [(1.234, "1.23"), (float("nan"), "")])
def test_a_number_that_is_missing_is_left_empty(value, text):
    assert tables.number(value) == text
