"""The comparison of all FP32 engines: its record, and that every row refers to its winner."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FakeWorker

from utils import environment, stats
from utils.backends import registry
from utils.catalog import Run
from utils.cli import Options
from utils.errors import UserError
from utils.experiment import Experiment
from utils.timing import fastest, rounds
from utils.training.checkpoints import Checkpoint

PTQ, FP32 = Run("resnet18", "ptq", "int8"), Run("resnet18", "fp32", "fp32")


def problem(name, device):
    return "no compiler" if name in ("compile", "inductor") else None


@pytest.fixture
def find(monkeypatch, tmp_path):
    """Search with fake processes; returns the result of `find` and the engines it started."""
    monkeypatch.setattr(fastest, "Worker", FakeWorker)
    monkeypatch.setattr(rounds, "WARMUP_S", 0)
    monkeypatch.setattr(registry, "problem", problem)
    monkeypatch.setattr(environment, "cpu", lambda: ("a processor", ("avx2", "avx512_vnni")))
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "2.13.0"})

    def find(batch_sizes, sha256="abc", run=PTQ, **changes):
        FakeWorker.log.clear()
        options = Options(("native",), threads=2, results=tmp_path).replace(**changes)
        data = SimpleNamespace(study="drawn", test="images")
        experiment = Experiment(run, options, data, Checkpoint(tmp_path / "b", None, sha256, {}))
        best = fastest.find(experiment, batch_sizes, options)
        return best, [call[0] for call in FakeWorker.log if call[1] == "start"]

    return find


ABLE = ["native", "onnxruntime", "openvino", "xnnpack", "frozen"]


def test_every_engine_that_can_run_is_timed_and_the_fastest_is_named(find):
    best, started = find([1, 8])
    assert set(started) == set(ABLE)
    for size in (1, 8):
        assert best[size]["fp32_ms"] == pytest.approx(
            {name: 30 if name == "native" else 20 for name in ABLE}
        )
        assert best[size]["best_fp32"] in ABLE[1:]
        assert best[size]["fp32_missing"]["compile"] == "no compiler"


def test_the_comparison_is_a_record_of_the_study_and_a_table(find, tmp_path):
    best, _ = find([1, 8])
    record = json.loads((tmp_path / "drawn/fp32_engines/resnet18_cpu.json").read_text())
    assert [point["batch_size"] for point in record["points"]] == [1, 8]
    point = record["points"][0]
    assert (point["cpu"], point["threads"], point["tier"]) == ("a processor", 2, "quick")
    assert point["versions"] == {"torch": "2.13.0"} and point["missing"] == best[1]["fp32_missing"]
    assert point["time_utc"] and set(point["engines"]) == set(ABLE)
    with (tmp_path / "drawn/fp32_engines.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * len(ABLE)
    winners = [row for row in table if row["fastest"] == "True"]
    assert [row["backend"] for row in winners] == [best[1]["best_fp32"], best[8]["best_fp32"]]
    assert {row["over_fastest"] for row in table if row["backend"] == "native"} == {"1.5"}


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "other weights"}, {"seed": 7}, {"timing": "standard"}, {"timing": "brief"},
        {"checkpoints": "elsewhere"},
    ],
)  # fmt: skip
def test_every_row_of_a_study_has_the_winner_of_one_comparison(find, change):
    first, _ = find([1])
    again, started = find([1], **change)
    assert again == first and started == []


def test_other_code_and_another_day_do_not_start_a_new_comparison(find, monkeypatch, capsys):
    first, _ = find([1])
    monkeypatch.setattr(environment, "code_of", lambda *modules: {"code": "changed"})
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "2.14.0"})
    capsys.readouterr()
    again, started = find([1])
    assert again == first and started == []
    assert "found with other versions of torch" in capsys.readouterr().out


def test_a_point_that_is_missing_is_added(find):
    first, _ = find([1])
    both, started = find([1, 8])
    assert started and both[1] == first[1]
    assert {call[3] for call in FakeWorker.log if call[1] == "hold"} == {8}
    _, started = find([1], threads=1)
    assert started and find([1, 8])[1] == find([1], threads=1)[1] == []


def test_another_processor_or_gpu_has_a_comparison_of_its_own(find, monkeypatch):
    find([1])
    with monkeypatch.context() as patch:
        patch.setattr(environment, "cpu", lambda: ("another", ("avx2",)))
        assert find([1])[1]
        assert find([1])[1] == []
    for gpu in ("one GPU", "another GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu=gpu: gpu)
        assert find([1], device="cuda")[1]
        assert find([1], device="cuda")[1] == []
    assert find([1])[1] == []


def test_an_fp32_script_replaces_a_briefer_comparison_and_others_do_not(find, monkeypatch):
    monkeypatch.setattr(registry, "problem", lambda name, device: None)
    brief, started = find([1], timing="brief")
    assert "compile" not in started and "brief" in brief[1]["fp32_missing"]["compile"]
    assert find([1], timing="quick")[1] == []
    _, started = find([1], run=FP32, timing="quick")
    assert "compile" in started
    assert find([1], run=FP32, timing="quick")[1] == []
    assert find([1], run=FP32, timing="brief")[1] == []


def test_brief_timing_also_says_why_an_engine_cannot_run(find):
    assert find([1], timing="brief")[0][1]["fp32_missing"]["compile"] == "no compiler"


def test_a_winner_that_cannot_run_here_ends_the_script_with_a_line(find, monkeypatch):
    best, _ = find([1])
    name = best[1]["best_fp32"]
    monkeypatch.setattr(
        registry, "problem", lambda other, device: "not installed" if other == name else None
    )
    with pytest.raises(UserError, match=f"{name} is the fastest FP32 of this study"):
        find([1])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"points": 3}'])
def test_a_damaged_record_is_measured_again(find, tmp_path, content):
    first, _ = find([1])
    (tmp_path / "drawn/fp32_engines/resnet18_cpu.json").write_text(content)
    again, started = find([1])
    assert started and again == first


def test_a_smoke_run_compares_nothing_and_keeps_nothing(find, tmp_path):
    best, started = find([1], smoke=True)
    assert started == [] and list(tmp_path.iterdir()) == []
    assert best == {1: {"best_fp32": "native", "fp32_ms": {}, "fp32_missing": {}}}


def test_of_two_scripts_at_once_the_second_takes_the_result_of_the_first(find, monkeypatch):
    held = fastest.FileLock
    theirs = []

    def overtaken(path):
        """Wait for the lock while another script measures."""
        monkeypatch.setattr(fastest, "FileLock", held)
        theirs.append(find([1, 8])[0])
        FakeWorker.log.clear()
        return held(path)

    monkeypatch.setattr(fastest, "FileLock", overtaken)
    ours, started = find([1])
    assert started == [] and ours[1] == theirs[0][1]


def launches(*ratios):
    """Milliseconds of native (10) and of another engine, by launch and round."""
    return {"native": [[10.0] * 5] * len(ratios), "xnnpack": [[10.0 * r] * 5 for r in ratios]}


@pytest.mark.parametrize(
    ("ratios", "winner", "tied"),
    [
        ((0.5, 0.51, 0.5, 0.49), "xnnpack", []),
        ((1.5, 1.51, 1.5, 1.49), "native", []),
        ((0.9, 1.1, 0.95, 1.04), "xnnpack", ["native"]),  # cannot be told apart
        ((0.5, 0.5, 0.5), "xnnpack", ["native"]),  # three launches give no interval
    ],
)
def test_engines_that_cannot_be_told_apart_are_tied(ratios, winner, tied):
    told = fastest.describe(launches(*ratios))
    assert (told["fastest"], told["tied"]) == (winner, tied)
    other = told["engines"]["native" if winner == "xnnpack" else "xnnpack"]
    assert other["over_fastest"] > 1
    assert told["engines"][winner]["over_fastest"] == 1
    if len(ratios) > 3:
        assert other["over_fastest_ci_low"] < other["over_fastest"] < other["over_fastest_ci_high"]


def test_a_clear_comparison_ends_early_and_an_unclear_one_does_not(find, monkeypatch):
    monkeypatch.setattr(fastest, "ENGINES", ("native", "xnnpack"))
    _, started = find([1])
    assert len(started) == 2 * stats.FEWEST_LAUNCHES
    rng = np.random.default_rng(0)
    noisy = lambda sides, split, size: rng.uniform(1, 2, (3, len(sides)))  # noqa: E731
    monkeypatch.setattr(rounds, "compare", noisy)
    _, started = find([8])
    assert len(started) == 2 * fastest.LAUNCHES["quick"]
