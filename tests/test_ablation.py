"""The ablation of INT8: its steps, what it stores, and that it resumes where it stopped."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import split_of

from quantization import ablation as script
from quantization.ablation import (
    CAUSES,
    CHANNELS,
    COLUMNS,
    LAYER_COLUMNS,
    STACKED,
    VARIATIONS,
    Step,
)
from utils.catalog import Run
from utils.experiment import Experiment

PTQ, QAT = (script.recipe_of(Run("mobilenetv3", method, "int8")) for method in ("ptq", "qat"))


def recipe_of(listed, name, kind):
    (recipe,) = [step.recipe for step in listed if (step.name, step.kind) == (name, kind)]
    return recipe


def test_each_step_stands_alone_and_on_top_of_those_before_it():
    listed = script.steps(PTQ, QAT, ("stem",))
    assert [(step.name, step.kind) for step in listed] == [
        ("the plainest", "stacked"),
        (CHANNELS, "stacked"),
        *((step, "stacked") for step in STACKED),
        ("QAT", "trained"),
        *((step, "alone") for step in STACKED),
        *((change, "varied") for change in VARIATIONS),
        *((cause, "cause") for cause in CAUSES),
    ]
    start = recipe_of(listed, CHANNELS, "stacked")
    assert recipe_of(listed, "the plainest", "stacked") == start.replace(weight_scales="tensor")
    assert recipe_of(listed, "bias correction", "alone") == start.replace(bias_correction=True)
    assert recipe_of(listed, "reconstruction", "stacked").keep_fp32 == ()
    top = recipe_of(listed, "first blocks in FP32", "stacked")
    assert top.keep_fp32 == ("stem",) and top.reconstruct and top.equalize and top.ranges == "mse"
    assert recipe_of(listed, "QAT", "trained") == QAT
    assert all(step.recipe.overflow_fix == "weights" for step in listed)
    assert recipe_of(listed, "the study's recipe", "varied") == PTQ
    activations, both = (recipe_of(listed, name, "cause") for name in CAUSES)
    assert activations == start.replace(activation_scales="tensor")
    assert both == activations.replace(weight_scales="tensor")
    fewer = recipe_of(listed, "with 100 calibration images", "varied")
    assert fewer == PTQ.replace(calibration_images=100)
    assert all(step.facts == step.recipe.describe() for step in listed)


def test_tools_that_are_not_installed_are_named_and_left_out(monkeypatch, capsys):
    from utils.backends import tool_defaults

    absent = tool_defaults.Tool("openvino", "a_package_that_nobody_has", ".xml", None)
    monkeypatch.setattr(
        tool_defaults,
        "TOOL_DEFAULTS",
        {"torch FX": tool_defaults.TOOL_DEFAULTS["torch FX"], "Other": absent},
    )
    (tool,) = script.tools()
    assert (tool.name, tool.kind) == ("torch FX", "tool") and tool.facts["version"]
    assert (
        "default of Other left out: not installed: a_package_that_nobody_has"
        in capsys.readouterr().out
    )


def test_the_quality_of_four_answers():
    logits = np.array([[2, 0], [0, 1], [1, 0], [0, 3]], np.float32)
    fp32 = np.array([[2, 0], [0, 1], [0, 1], [0, 3]], np.float32)
    row = script.quality(logits, fp32, np.array([0, 1, 1, 1]))
    assert (row["images"], row["accuracy"], row["accuracy_fp32"], row["agreement_fp32"]) == (
        4,
        0.75,
        1.0,
        0.75,
    )
    # Squares of the FP32 logits over squares of the difference.
    assert row["sqnr_db"] == pytest.approx(10 * np.log10(15 / 2))
    assert row["accuracy_ci_low"] < 0.75 < row["accuracy_ci_high"]


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """Run an ablation of three steps that cost nothing; returns the names of those measured."""
    split = split_of(tmp_path, np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1]))
    measured = []

    def measure(experiment, backend, step, fp32):
        assert fp32["test"].shape == (4, 2)
        measured.append(step.name)
        columns = {}
        for part, logits in fp32.items():
            for name, value in script.quality(logits, logits, split.y).items():
                columns[f"{part}_{name}"] = value
        layers = [{"layer": "conv1", "sqnr_db": 30.0}, {"layer": "fc", "sqnr_db": None}]
        return {"seconds": 1.0} | columns, [] if step.kind == "tool" else layers

    def again(sha256="a"):
        baseline = SimpleNamespace(sha256=sha256, model=lambda x: x[:, :2, 0, 0])
        data = SimpleNamespace(validation=split, test=split, digest="b")
        options = SimpleNamespace(smoke=True)
        experiment = Experiment(Run("resnet18", "ptq", "int8"), options, data, baseline)
        measured.clear()
        script.run(experiment, SimpleNamespace(name="fbgemm"), tmp_path / "ablation", STEPS)
        return list(measured)

    monkeypatch.setattr(script, "measure", measure)
    (tmp_path / "ablation").mkdir()
    return again, tmp_path


STEPS = [
    Step("a", "tool", None, {}),
    Step("b", "stacked", None, dict(bits=8)),
    Step("c", "alone", None, dict(bits=8, keep_fp32=("stem",))),
]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_steps_are_stored_and_not_measured_twice(ablation):
    again, folder = ablation
    assert again() == ["a", "b", "c"]
    rows = rows_of(folder / "ablation.csv")
    assert tuple(rows[0]) == COLUMNS and [row["rung"] for row in rows] == ["a", "b", "c"]
    layers = rows_of(folder / "ablation_layers.csv")
    assert tuple(layers[0]) == LAYER_COLUMNS
    assert [(row["rung"], row["layer"], row["sqnr_db"]) for row in layers] == [
        ("b", "conv1", "30.0"), ("b", "fc", ""), ("c", "conv1", "30.0"), ("c", "fc", "")
    ]  # fmt: skip
    assert again() == []
    damaged = folder / "ablation/resnet18_fbgemm_01.json"
    damaged.write_text("{")
    (folder / "ablation/resnet18_fbgemm_02.json").write_text("{")
    assert again() == ["b", "c"]
    content = json.loads(damaged.read_text())
    damaged.write_text(json.dumps(content | {"code": {"utils/metrics.py": "0" * 64}}))
    assert again() == ["b"]
    assert len(again(sha256="other weights")) == 3


@pytest.mark.slow
def test_the_command_takes_all_steps_on_a_few_images(tmp_path):
    from test_scripts import run

    folders = ("--results", "out", "--checkpoints", "weights")
    options = ("--smoke", "--threads", "1", "--models", "mobilenetv3", *folders)
    done = run("quantization/ablation.py", *options, cwd=tmp_path)
    assert "step 4 of 23: XNNPACK (tool)" in done.stdout
    assert "step 13 of 23: QAT (trained)" in done.stdout
    assert len(list((tmp_path / "out/drawn_smoke/ablation").glob("*.json"))) == 23
    for name in ("ablation", "ablation_layers"):
        where = ("--study", "drawn_smoke", "--results", "out", "--out", "here")
        drawn = run(f"figures/{name}.py", *where, cwd=tmp_path)
        assert (tmp_path / f"here/{name}.png").exists(), drawn.stderr
