"""The ladder of INT8: which steps it takes, what it stores, and that it goes on where it stopped."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import split_of

from quantization import ablation as script
from quantization.ablation import CHANNELS, COLUMNS, LAYER_COLUMNS, STEPS, VARIATIONS, Rung
from utils.catalog import Run

PTQ, QAT = dict(keep_fp32=(), seven_bits="weights"), dict(training={}, calibration_images=4)


def recipe_of(climbed, name, kind):
    (recipe,) = [rung.recipe for rung in climbed if (rung.name, rung.kind) == (name, kind)]
    return recipe


def test_each_step_stands_alone_and_on_top_of_those_before_it():
    climbed = script.steps(PTQ, QAT, ("stem",))
    assert [(rung.name, rung.kind) for rung in climbed] == [
        ("the plainest", "stacked"),
        (CHANNELS, "stacked"),
        *((step, "stacked") for step in STEPS),
        ("QAT", "trained"),
        *((step, "alone") for step in STEPS),
        *((change, "varied") for change in VARIATIONS),
    ]
    start = recipe_of(climbed, CHANNELS, "stacked")
    assert recipe_of(climbed, "the plainest", "stacked") == start | {"weights": "tensor"}
    assert recipe_of(climbed, "bias correction", "alone") == start | {"bias_correction": True}
    assert recipe_of(climbed, "reconstruction", "stacked")["keep_fp32"] == ()
    top = recipe_of(climbed, "first blocks in FP32", "stacked")
    assert (
        top["keep_fp32"] == ("stem",)
        and top["reconstruct"]
        and top["equalize"]
        and top["activations"] == "mse"
    )
    assert recipe_of(climbed, "QAT", "trained") == QAT
    assert all(rung.recipe["seven_bits"] == "weights" for rung in climbed if rung.kind != "trained")
    assert recipe_of(climbed, "the study's recipe", "varied") == PTQ
    assert recipe_of(climbed, "with 100 calibration images", "varied") == PTQ | {
        "calibration_images": 100
    }


def test_tools_that_are_not_installed_are_named_and_left_out(monkeypatch, capsys):
    from utils.backends import tool_defaults

    absent = tool_defaults.Tool("openvino", "a_package_that_nobody_has", ".xml", None)
    monkeypatch.setattr(
        tool_defaults,
        "PEERS",
        {"torch FX": tool_defaults.TOOL_DEFAULTS["torch FX"], "Other": absent},
    )
    (tool,) = script.tools()
    assert (tool.name, tool.kind) == ("torch FX", "tool") and tool.recipe["version"]
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
    assert row["sqnr_db"] == pytest.approx(
        10 * np.log10(15 / 2)
    )  # squares of the reference over those of the difference
    assert row["accuracy_ci_low"] < 0.75 < row["accuracy_ci_high"]


@pytest.fixture
def climbing(tmp_path, monkeypatch):
    """Climb a ladder of three rungs that cost nothing; returns the names of those climbed."""
    split = split_of(tmp_path, np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1]))
    climbed = []

    def climb(experiment, backend, rung, references):
        assert references["test"].shape == (4, 2)
        climbed.append(rung.name)
        parts = {f"{part}_{name}": value for part in references for name, value in
                 script.quality(references[part], references[part], split.y).items()}  # fmt: skip
        layers = [{"layer": "conv1", "sqnr_db": 30.0}, {"layer": "fc", "sqnr_db": None}]
        return {"seconds": 1.0} | parts, [] if rung.kind == "tool" else layers

    def again(**changes):
        facts = SimpleNamespace(sha256="a", model=lambda x: x[:, :2, 0, 0]) if not changes else SimpleNamespace(
            model=lambda x: x[:, :2, 0, 0], **changes)  # fmt: skip
        data = SimpleNamespace(validation=split, test=split, digest="b")
        experiment = SimpleNamespace(
            run=Run("resnet18", "ptq", "int8"),
            data=data,
            baseline=facts,
            options=SimpleNamespace(smoke=True),
        )
        climbed.clear()
        script.ladder(experiment, SimpleNamespace(name="fbgemm"), tmp_path / "ablation", RUNGS)
        return list(climbed)

    monkeypatch.setattr(script, "climb", climb)
    (tmp_path / "ablation").mkdir()
    return again, tmp_path


RUNGS = [
    Rung("a", "tool", {}),
    Rung("b", "stacked", dict(bits=8)),
    Rung("c", "alone", dict(bits=8, keep_fp32=("stem",))),
]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rungs_are_stored_and_not_climbed_twice(climbing):
    again, folder = climbing
    assert again() == ["a", "b", "c"]
    rows = rows_of(folder / "ablation.csv")
    assert tuple(rows[0]) == COLUMNS and [row["rung"] for row in rows] == ["a", "b", "c"]
    layers = rows_of(folder / "ablation_layers.csv")
    assert tuple(layers[0]) == LAYER_COLUMNS
    assert [(row["rung"], row["layer"], row["sqnr_db"]) for row in layers] == [
        ("b", "conv1", "30.0"), ("b", "fc", ""), ("c", "conv1", "30.0"), ("c", "fc", "")
    ]  # fmt: skip
    assert again() == []
    damaged = folder / "ladder/resnet18_fbgemm_01.json"
    damaged.write_text("{")
    (folder / "ladder/resnet18_fbgemm_02.json").write_text("{")
    assert again() == ["b", "c"]
    content = json.loads(damaged.read_text())
    damaged.write_text(json.dumps(content | {"code": {"utils/metrics.py": "0" * 64}}))
    assert again() == ["b"]
    assert len(again(sha256="other weights")) == 3


@pytest.mark.slow
def test_the_command_climbs_all_rungs_on_a_few_images(tmp_path):
    from test_scripts import run

    options = (
        "--smoke",
        "--threads",
        "1",
        "--models",
        "mobilenetv3",
        "--results",
        "out",
        "--checkpoints",
        "weights",
    )
    done = run("quantization/ablation.py", *options, cwd=tmp_path)
    assert (
        "rung 4 of 23: XNNPACK (tool)" in done.stdout
        and "rung 13 of 23: QAT (trained)" in done.stdout
    )
    assert len(list((tmp_path / "out/drawn_smoke/ladder").glob("*.json"))) == 23
    for name in ("ablation", "ablation_layers"):
        drawn = run(
            f"figures/{name}.py",
            "--study",
            "drawn_smoke",
            "--results",
            "out",
            "--out",
            "here",
            cwd=tmp_path,
        )
        assert (tmp_path / f"here/{name}.png").exists(), drawn.stderr
