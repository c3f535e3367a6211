"""The ablation of INT8: its steps, what it stores, and that it resumes where it stopped."""

import csv
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import bright_and_dark, mobilenet_checkpoint, split_of
from records import write_run

from figures import ablation as draw
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
from utils import data, engines, environment, measure, training
from utils.backends import registry
from utils.catalog import Run
from utils.cli import Options
from utils.experiment import Experiment
from utils.measure import layer_errors
from utils.quantize import reconstruction
from utils.training import loop

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


@pytest.mark.parametrize(("name", "method"), [("the study's recipe", "ptq"), ("QAT", "qat")])
def test_a_step_by_the_recipe_of_a_script_makes_its_network_bit_for_bit(
    tmp_path, monkeypatch, name, method
):
    """Both start from one checkpoint; neither reuses what the other trained."""
    baseline = mobilenet_checkpoint(tmp_path / "mobilenetv3_fp32_seed0.pt")
    images, engine = bright_and_dark(tmp_path / "images", side=32), registry.get("openvino")
    monkeypatch.setattr(reconstruction, "MOST_STEPS", 2)
    monkeypatch.setattr(type(engine), "problem", lambda self: None)
    monkeypatch.setattr(data, "load_images", lambda options: images)
    monkeypatch.setattr(training, "load_fp32", lambda *arguments: baseline)
    monkeypatch.setattr(engines, "select", lambda experiment, recipe: [(engine, recipe)])
    monkeypatch.setattr(script, "_loaded", lambda *arguments: None)
    made = []
    monkeypatch.setattr(
        measure, "run", lambda experiment, recipe, deployed, *_: made.append(deployed.quantized)
    )
    monkeypatch.setattr(
        layer_errors, "errors", lambda deployed, shown: made.append(deployed.quantized) or []
    )
    of_script = importlib.import_module(f"quantization.{method}.mobilenetv3_{method}_int8")
    folders = [tmp_path / "script", tmp_path / "ablation"]
    of_one, of_other = (Options(backends=("openvino",), checkpoints=folder) for folder in folders)
    of_script.main(of_one)
    experiment = Experiment(Run("mobilenetv3", "ptq", "int8"), of_other, images, baseline)
    loop.predict(baseline.model, images.validation)
    listed = script.steps(PTQ, QAT, ("features.0",))
    before = [step for step in listed if (step.name, step.kind) == ("bias correction", "alone")]
    (step,) = [step for step in listed if step.name == name]
    for taken in (*before, step):
        script.answering(experiment, engine, taken)
    first, *_, last = made
    assert len(made) == 3 and first.digest() == last.digest() != made[1].digest()


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

    def again(sha256="a", threads=2, backend=None):
        baseline = SimpleNamespace(sha256=sha256, model=lambda x: x[:, :2, 0, 0])
        data = SimpleNamespace(validation=split, test=split, digest="b")
        options = SimpleNamespace(smoke=True, threads=threads)
        experiment = Experiment(Run("resnet18", "ptq", "int8"), options, data, baseline)
        measured.clear()
        backend = backend or SimpleNamespace(name="fbgemm")
        script.run(experiment, backend, tmp_path / "ablation", STEPS)
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
    assert len(again(sha256="other weights", threads=1)) == 3  # sums depend on them
    assert {row["threads"] for row in rows_of(folder / "ablation.csv")} == {"1"}


def test_a_step_says_what_could_overflow_where_it_was_measured(ablation, monkeypatch):
    again, folder = ablation
    engine = registry.get("openvino")
    recipe = PTQ.replace(portable=True)
    monkeypatch.setitem(globals(), "STEPS", [script.of_recipe("narrow", "varied", recipe)])
    for vnni, overflow in ((True, "none"), (False, "all")):
        monkeypatch.setattr(environment, "has_vnni", lambda *names, vnni=vnni: vnni)
        again(sha256=overflow, backend=engine)
        (row,) = rows_of(folder / "ablation.csv")
        assert row["overflow"] == overflow


@pytest.mark.parametrize("changed", [None, "recipe", "baseline", "data", "rung"])
def test_a_step_by_a_scripts_recipe_has_the_agreement_of_its_run_beside_it(tmp_path, changed):
    path = write_run(tmp_path, "resnet18", "ptq", "int8", "fbgemm")
    record = json.loads(path.read_text()) | {"recipe": {"bits": 8}}
    record["provenance"]["baseline_sha256"] = "b" * 64
    record["metrics"]["agreement_fp32"] = 0.9955
    path.write_text(json.dumps(record))
    facts = {
        "recipe": record["recipe"],
        "baseline": record["provenance"]["baseline_sha256"],
        "data": record["provenance"]["data_sha256"],
    }
    row = {"model": "resnet18", "backend": "fbgemm", "rung": "the study's recipe"}
    if changed:
        where = row if changed == "rung" else facts
        where[changed] = {"rung": "MSE ranges", "recipe": {"bits": 7}}.get(changed, "0" * 64)
    content = {"row": row, "facts": facts, "code": {"utils/quantize/exact.py": "1" * 64}}
    made = script.row_of(content, path.parents[1] / "ablation")
    expected = None if changed else 0.9955
    assert made["study_agreement_fp32"] == expected and made["threads"] is None
    other = content | {"code": {"utils/quantize/exact.py": "2" * 64, "utils/cli.py": "1" * 64}}
    assert script.row_of(other, path.parents[1])["method_code"] != made["method_code"]
    same = content | {"code": content["code"] | {"utils/backends/fp32.py": "3" * 64}}
    assert script.row_of(same, path.parents[1])["method_code"] == made["method_code"]


def figure_rows(**columns):
    rows = pd.DataFrame({"rung": ["QAT", draw.NARROW], "kind": ["trained", "varied"]})
    rows["test_agreement_fp32"] = [0.9925, 0.995]
    return rows.assign(**columns)


def test_the_figure_names_steps_unlike_the_scripts_run_and_mixed_code():
    assert draw.caveats(figure_rows()) == []
    assert draw.NARROW in VARIATIONS and set(script.OF_SCRIPTS) <= {"QAT", *VARIATIONS}
    same = dict(study_agreement_fp32=[0.9925, None], method_code=["a", "a"])
    assert draw.caveats(figure_rows(**same)) == []
    apart = dict(study_agreement_fp32=[0.9955, None], method_code=["a", "b"])
    code, agreement = draw.caveats(figure_rows(**apart))
    assert code == "2 versions of the method's code made these steps"
    assert agreement.startswith(
        "QAT: agrees with FP32 on 99.25%, and on 99.55% in the script's run"
    )


@pytest.mark.parametrize(
    ("overflow", "arithmetic_only"), [(None, True), ("none", True), ("all", False)]
)
def test_the_figure_says_if_no_sum_could_overflow(overflow, arithmetic_only):
    rows = figure_rows() if overflow is None else figure_rows(overflow=["none", overflow])
    assert draw.labels(rows)["QAT"] == "QAT"
    assert ("arithmetic only" in draw.labels(rows)[draw.NARROW]) == arithmetic_only


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
