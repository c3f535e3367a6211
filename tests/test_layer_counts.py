"""Counts of integer layers in records, new and old."""

import json

import pytest

from utils import layer_counts, paths, results

RUN = {"dtype": "int8", "simulated": False}


def of(kernels, total=54, **run):
    record = {"run": RUN | run, "footprint": {"weight_modules": total}}
    return layer_counts.integer_layers(record | {"backend": {"kernels": kernels}})


def test_an_engine_that_reports_its_layers_is_believed():
    assert of(layer_counts.counted(54, 45, kernels={"_qconv": 45})) == 45
    assert of({"layers": 54, "integer_layers": 54, "integer": {}}) == 54


def test_older_records_of_onnx_runtime_have_operators_alone():
    assert of({"QLinearConv": 51, "QGemm": 2, "FusedConv": 1, "QLinearMul": 9}) == 53
    assert of({"Conv": 52, "Gemm": 2, "Cast": 1}, dtype="fp16") == 0


def test_an_engine_that_shows_too_few_layers_says_nothing():
    assert of({"layers": 40, "integer_layers": 40}) is None
    assert of(None) is None
    record = {"run": RUN, "footprint": {}, "backend": {}}
    assert layer_counts.integer_layers(record) is None


def test_floats_and_simulations_have_no_integer_layers():
    assert of(None, dtype="fp32") == of(None, dtype="int16", simulated=True) == 0
    # In FP32, engines compute several layers together.
    assert of({"layers": 40, "integer_layers": 0}, dtype="bf16") == 0


@pytest.mark.parametrize(
    "kernels, layers",
    [({"QLinearConv": 51, "QGemm": 2, "FusedConv": 1}, 53), (None, None)],
)
def test_older_records_get_the_column_and_newer_ones_keep_theirs(kernels, layers):
    path = paths.RESULTS / "cats_and_dogs/runs/mobilenetv3_ptq_int8_onnxruntime_cpu_seed0.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["backend"]["kernels"] = kernels
    record["footprint"].pop("integer_layers", None)
    assert {row["integer_layers"] for row in results.rows_of(record)} == {layers}
    record["footprint"]["integer_layers"] = 52
    assert {row["integer_layers"] for row in results.rows_of(record)} == {52}
