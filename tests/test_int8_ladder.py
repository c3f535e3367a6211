"""The ladder of INT8: which steps it takes, what it stores, and that it goes on where it stopped."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import split_of

from quantization import int8_ladder as script
from quantization.int8_ladder import CHANNELS, COLUMNS, STEPS, rungs
from utils.catalog import Run


def recipe_of(climbed, name, stacked):
    (recipe,) = [each[2] for each in climbed if each[:2] == (name, stacked)]
    return recipe


def test_each_step_stands_alone_and_on_top_of_those_before_it():
    climbed = rungs(dict(keep_fp32=("stem",), seven_bits="weights"))
    names = [(name, stacked) for name, stacked, _ in climbed]
    assert names == [
        ("the plainest", True),
        (CHANNELS, True),
        *((step, True) for step in STEPS),
        *((step, False) for step in STEPS),
    ]
    start = recipe_of(climbed, CHANNELS, True)
    assert recipe_of(climbed, "the plainest", True) == start | {"weights": "tensor"}
    assert recipe_of(climbed, "bias correction", False) == start | {"bias_correction": True}
    top = recipe_of(climbed, "blocks in FP32", True)
    assert top["keep_fp32"] == ("stem",) and top["reconstruct"] and top["equalize"] and top["activations"] == "mse"
    assert all(recipe["seven_bits"] == "weights" for _, _, recipe in climbed)


def test_a_model_without_blocks_in_fp32_has_no_rung_for_them():
    assert "blocks in FP32" not in {name for name, _, _ in rungs(dict(keep_fp32=()))}


def test_the_quality_of_four_answers():
    logits = np.array([[2, 0], [0, 1], [1, 0], [0, 3]], np.float32)
    reference = np.array([[2, 0], [0, 1], [0, 1], [0, 3]], np.float32)
    row = script.quality(logits, reference, np.array([0, 1, 1, 1]))
    assert (row["images"], row["accuracy"], row["accuracy_fp32"], row["agreement_fp32"]) == (4, 0.75, 1.0, 0.75)
    assert row["sqnr_db"] == pytest.approx(10 * np.log10(15 / 2))  # squares of the reference over those of the difference
    assert row["accuracy_ci_low"] < 0.75 < row["accuracy_ci_high"]


@pytest.fixture
def climbing(tmp_path, monkeypatch):
    """Climb a ladder whose rungs cost nothing; returns the recipes that were climbed."""
    split = split_of(tmp_path, np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1]))
    recipes = []

    def climb(experiment, backend, recipe, references):
        assert references["test"].shape == (4, 2)
        recipes.append(recipe)
        parts = {f"{part}_{name}": value for part in references for name, value in
                 script.quality(references[part], references[part], split.y).items()}  # fmt: skip
        return {"seconds": 1.0} | parts

    def again(**changes):
        facts = SimpleNamespace(sha256="a", model=lambda x: x[:, :2, 0, 0]) if not changes else SimpleNamespace(
            model=lambda x: x[:, :2, 0, 0], **changes)  # fmt: skip
        data = SimpleNamespace(validation=split, test=split, digest="b")
        experiment = SimpleNamespace(
            run=Run("resnet18", "ptq", "int8"), data=data, baseline=facts, options=SimpleNamespace(smoke=True)
        )
        recipes.clear()
        script.ladder(experiment, SimpleNamespace(name="fbgemm"), tmp_path / "ladder")
        return list(recipes)

    monkeypatch.setattr(script, "climb", climb)
    (tmp_path / "ladder").mkdir()
    return again, tmp_path


def test_rungs_are_stored_and_not_climbed_twice(climbing):
    again, folder = climbing
    expected = rungs(dict(keep_fp32=()))
    assert again() == [recipe for _, _, recipe in expected]
    with (folder / "ladder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and [row["rung"] for row in rows] == [name for name, _, _ in expected]
    assert again() == []
    damaged = folder / "ladder/resnet18_fbgemm_03.json"
    damaged.write_text("{")
    (folder / "ladder/resnet18_fbgemm_05.json").write_text("{")
    assert again() == [expected[3][2], expected[5][2]]
    content = json.loads(damaged.read_text())
    damaged.write_text(json.dumps(content | {"code": {"utils/cli.py": "0" * 64}}))
    assert again() == [expected[3][2]]
    assert len(again(sha256="other weights")) == len(expected)


@pytest.mark.slow
def test_the_command_climbs_all_rungs_on_a_few_images(tmp_path):
    from test_scripts import run

    options = ("--smoke", "--threads", "1", "--models", "mobilenetv3", "--results", "out", "--checkpoints", "weights")
    done = run("quantization/int8_ladder.py", *options, cwd=tmp_path)
    assert "rung 14: blocks in FP32, alone" in done.stdout
    assert len(list((tmp_path / "out/drawn_smoke/ladder").glob("*.json"))) == 14
    drawn = run("figures/int8_ladder.py", "--study", "drawn_smoke", "--results", "out", "--out", "here", cwd=tmp_path)
    assert (tmp_path / "here/int8_ladder.png").exists(), drawn.stderr
