"""ONNX Runtime: FP32 as eager, INT8 as exact execution, and which kernels compute it."""

import importlib.util

import numpy as np
import onnx
import pytest
import torch
from helpers import Everything, small, uneven_images
from torch import nn

from utils import environment, metrics
from utils.backends import onnx_export, registry
from utils.quantize import ptq
from utils.quantize.exact import execute
from utils.training.checkpoints import Checkpoint

ENGINE = registry.get("onnxruntime")
RECIPE = dict(activations="minmax", keep_fp32=())
LAYERS = 8
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model():
    return small(Everything)


@pytest.fixture(scope="module")
def images():
    return torch.nn.functional.interpolate(uneven_images(24), size=(224, 224))


@pytest.fixture(scope="module")
def lowered(model, images, tmp_path_factory):
    """The quantized networks of 8 and 16 bits, and their artifacts."""
    folder, networks = tmp_path_factory.mktemp("onnx"), {}
    for bits in (8, 16):
        quantized = ptq.quantize(
            model, images, RECIPE | dict(bias_correction=True), ENGINE.qdq_config({"bits": bits})
        )
        networks[bits] = quantized, folder / f"{bits}{ENGINE.suffix}"
        ENGINE.lower(*networks[bits])
    return networks


def answers(path, x):
    return torch.cat([ENGINE.load(path, "cpu")(part) for part in x])


# ---- FP32


@torch.inference_mode()
def test_a_float_network_answers_as_eager_fp32(model, images, tmp_path):
    onnx_export.export(model, tmp_path / "float.onnx")
    predict = ENGINE.load(tmp_path / "float.onnx", "cpu")
    for count in (1, 3):
        x = images[:count].contiguous(memory_format=torch.channels_last)
        logits = predict(x)
        assert logits.dtype == torch.float32 and logits.shape == (count, 2)
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)
    counts = ENGINE.kernels(tmp_path / "float.onnx")
    assert (
        counts.get("QLinearConv", 0) == counts.get("QuantizeLinear", 0) == 0 and counts["Gemm"] == 2
    )


# ---- INT8


def test_int8_answers_as_its_exact_execution(lowered, model, images):
    quantized, path = lowered[8]
    exact = execute(quantized, images)
    logits = answers(path, images.split(24))
    assert metrics.sqnr_db(exact.numpy(), logits.numpy()) > 40
    with torch.inference_mode():
        assert metrics.sqnr_db(model(images).numpy(), logits.numpy()) > 30


def test_the_batch_size_is_free(lowered, images):
    for quantized, path in lowered.values():
        whole = answers(path, images.split(24))
        for count in (1, 3):
            assert (
                answers(path, images[:3].split(count)) - whole[:3]
            ).abs().max() < 1e-4 * whole.abs().max()
        assert whole.dtype == torch.float32 and len(quantized.layers) == LAYERS


def test_every_layer_runs_on_integers(lowered):
    counts = ENGINE.kernels(lowered[8][1])
    assert counts["QLinearConv"] == 6 and counts["QGemm"] == 2
    assert not {"Conv", "FusedConv", "Gemm"} & set(counts)
    assert counts["QLinearAdd"] == counts["QLinearMul"] == 1
    assert sum(counts.values()) < 40


def test_the_artifact_holds_integers(lowered):
    quantized, path = lowered[8]
    model = onnx.load(path)
    onnx.checker.check_model(model)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, layer in quantized.layers.items():
        weight = stored[f"{name}.weight"]
        assert weight.dtype == np.int8 and weight.tobytes() in (
            layer.weight.numpy().tobytes(),
            layer.weight.T.numpy().tobytes(),
        )
        biases = stored[f"{name}.bias_integers"]
        assert biases.dtype == np.int32 and np.array_equal(biases, layer.bias_integers.numpy())
        assert np.allclose(biases * stored[f"{name}.bias_scale"], layer.bias.numpy(), rtol=1e-6)
    assert not any(
        array.size > 8 and array.dtype == np.float32 for array in stored.values()
    )  # scales only


def extreme(layer: nn.Module) -> nn.Module:
    """`layer` with weights of one magnitude; those of the first two channels have one sign."""
    torch.manual_seed(4)
    with torch.no_grad():
        layer.weight.copy_(torch.where(torch.rand_like(layer.weight) < 0.5, -1.0, 1.0))
        layer.weight[0], layer.weight[1] = 1, -1
    return layer


EXTREME = {
    "convolution": nn.Conv2d(3, 4, 8, 8),
    "with groups": nn.Conv2d(3, 6, 8, 8, groups=3),
    "depthwise": nn.Conv2d(3, 3, 9, 9, groups=3),
    "without bias": nn.Conv2d(3, 4, 8, 8, bias=False),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("factor", ["activations", "weights"])
@torch.no_grad()
def test_kernels_compute_what_the_integers_say(tmp_path, name, factor):
    """Large weights and inputs: where products are added up in too few bits, the sum is far off."""
    images = torch.rand(4, 3, 224, 224)
    images[:2] = images[:2].round()
    images[2] = 1
    model = nn.Sequential(extreme(EXTREME[name]), nn.MaxPool2d(4)).eval()
    quantized = ptq.quantize(
        model, images, RECIPE, ENGINE.qdq_config({"bits": 8, "seven_bits": factor})
    )
    assert quantized.layers["0"].weight.abs().min() == quantized.layers["0"].high
    ENGINE.lower(quantized, tmp_path / "artifact.onnx")
    assert ENGINE.kernels(tmp_path / "artifact.onnx").get("QLinearConv") == 1
    difference = answers(tmp_path / "artifact.onnx", [images]) - execute(quantized, images)
    assert difference.abs().max() < 1.01 * quantized.qdq("qdq__0").scale


def test_modules_kept_in_fp32_compute_between_integers(model, images, tmp_path):
    """ONNX Runtime quantizes float weights between pairs by default, with one scale."""
    recipe = RECIPE | dict(keep_fp32=("conv", "norm", "reduce", "fc"))
    quantized = ptq.quantize(model, images, recipe, ENGINE.qdq_config({"bits": 8}))
    ENGINE.lower(quantized, tmp_path / "artifact.onnx")
    counts = ENGINE.kernels(tmp_path / "artifact.onnx")
    assert (counts["QLinearConv"], counts["QGemm"]) == (4, 1)
    assert counts.get("Conv", 0) + counts.get("FusedConv", 0) == 2 and counts["Gemm"] == 1
    exact = execute(quantized, images)
    assert (
        metrics.sqnr_db(exact.numpy(), answers(tmp_path / "artifact.onnx", [images]).numpy()) > 70
    )


# ---- FP16


def test_fp16_answers_as_fp32_within_its_resolution(model, images, tmp_path):
    deployed = ENGINE.quantize(model, None, {})
    assert {numbers.bits for numbers in deployed.stored} == {16} and deployed.quantized is None
    deployed.save(path := tmp_path / "half.onnx")
    stored = {
        onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in onnx.load(path).graph.initializer
    }
    assert stored - {"INT64"} == {"FLOAT16"}
    with torch.inference_mode():
        assert metrics.sqnr_db(model(images).numpy(), ENGINE.load(path, "cpu")(images).numpy()) > 50


def test_qat_of_fp16_deploys_what_was_rounded_in_training(model, images, tmp_path):
    assert ENGINE.training({}) == registry.get("half").training({})
    network = ENGINE.prepare(model, images, {})
    with torch.no_grad():
        network.head.bias.fill_(5.0)
        expected = network(images)
    trained = Checkpoint(tmp_path, network.eval(), "", {})
    ENGINE.convert(trained, model, images, {}).save(tmp_path / "artifact.onnx")
    assert (
        metrics.sqnr_db(expected.numpy(), answers(tmp_path / "artifact.onnx", [images]).numpy())
        > 40
    )


# ---- INT16


def test_int16_answers_as_its_exact_execution(lowered, images):
    quantized, path = lowered[16]
    assert quantized.config.activation is torch.int16
    assert (
        metrics.sqnr_db(execute(quantized, images).numpy(), answers(path, images.split(24)).numpy())
        > 70
    )


# ---- the backend


@pytest.mark.parametrize("vnni", [True, False])
def test_products_are_narrow_without_vnni(monkeypatch, vnni):
    monkeypatch.setattr(environment, "has_vnni", lambda: vnni)
    assert ENGINE.default_config(8).narrow is not vnni
    assert not ENGINE.default_config(16).narrow  # between its pairs it computes in FP32


def test_a_missing_package_is_named(monkeypatch):
    assert ENGINE.problem() is None
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("onnxruntime", "onnxscript") else find(name),
    )
    assert (
        ENGINE.problem()
        == "not installed: onnxruntime, onnxscript (pip install -r requirements.txt)"
    )


def test_torch_runs_nothing_of_what_is_deployed(model, images):
    deployed = ENGINE.quantize(model, images[:2], RECIPE | dict(bits=8))
    assert deployed.predict is None and deployed.network is None and deployed.quantized is not None
    assert deployed.facts["quantized"] == sorted(deployed.quantized.layers)
    assert deployed.facts["placement"] == ENGINE.qdq_config({"bits": 8}).describe()


def test_a_session_has_the_threads_of_this_process(lowered):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert (
                ENGINE.session(lowered[8][1]).get_session_options().intra_op_num_threads == threads
            )
    finally:
        torch.set_num_threads(before)
