"""ONNX Runtime: FP32 as eager, INT8 as exact execution, and its kernels."""

import importlib.util

import numpy as np
import onnx
import pytest
import torch
from helpers import Everything, deployed_on, small, uneven_images
from torch import nn

from utils import environment, metrics
from utils.backends import onnx_export, registry
from utils.backends.base import Lowered
from utils.quantize import ptq
from utils.quantize.bias_correction import correct_biases
from utils.quantize.exact import execute
from utils.quantize.initialize import initialize
from utils.recipes import FineTuning, Fp16QAT, Int8

ENGINE = registry.get("onnxruntime")
RECIPE = Int8(ranges="minmax", calibration_images=24)
TRAINING = FineTuning(
    epochs=1, batch_size=8, backbone_lr=0.0, head_lr=0.0, warmup_epochs=0, weight_decay=0.0,
    clip_norm=1.0, augment=None, amp=False, patience=0, distill=False,
)  # fmt: skip
FP16_QAT = Fp16QAT(calibration_images=24, training=TRAINING)
LAYERS = 8  # of Everything
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
        network = initialize(model, images, RECIPE, ENGINE.default_config(bits))
        correct_biases(network, images)
        networks[bits] = network, folder / f"{bits}{ENGINE.suffix}"
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
    assert counts["integer_layers"] == counts["operators"].get("QuantizeLinear", 0) == 0
    assert counts["operators"]["Gemm"] == 2


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
            difference = answers(path, images[:3].split(count)) - whole[:3]
            assert difference.abs().max() < 1e-4 * whole.abs().max()
        assert whole.dtype == torch.float32 and len(quantized.layers) == LAYERS


def test_every_layer_runs_on_integers(lowered):
    kernels = ENGINE.kernels(lowered[8][1])
    assert kernels["layers"] == kernels["integer_layers"] == LAYERS
    counts = kernels["operators"]
    assert counts["QLinearConv"] == 6 and counts["QGemm"] == 2
    assert counts["QLinearAdd"] == counts["QLinearMul"] == 1
    assert sum(counts.values()) < 40
    assert ENGINE.kernels(lowered[16][1])["integer_layers"] == 0


class Joined(nn.Module):
    """A ReLU after a convolution, after a sum, and after a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(self.block(x) + x)
        return self.head(self.relu(self.hidden(torch.flatten(self.pool(x), 1))))


def test_a_range_that_begins_below_0_after_relu_leaves_every_layer_on_integers(tmp_path, images):
    """Training moves such ranges. ONNX Runtime then keeps the ReLU, and its layer in FP32."""
    torch.manual_seed(0)
    quantized = ptq(Joined().eval(), images, RECIPE, ENGINE.qdq_config(RECIPE))
    names = [name for name in quantized.qdqs.source if quantized.qdq(name).numbers[1] == 0]
    assert len(names) == 4  # after each ReLU, and the average, which has the range of its input
    for name in names:
        quantized.qdq(name).assign(quantized.qdq(name).scale, torch.tensor(6))
    ENGINE.lower(quantized, path := tmp_path / "artifact.onnx")
    onnx.checker.check_model(onnx.load(path))
    kernels = ENGINE.kernels(path)
    assert kernels["layers"] == kernels["integer_layers"] == 4
    assert kernels["operators"]["QLinearAdd"] == 1 and kernels["operators"]["Clip"] == 3
    exact, logits = execute(quantized, images), answers(path, [images])
    assert metrics.sqnr_db(exact.numpy(), logits.numpy()) > 40


def test_the_artifact_holds_integers(lowered):
    quantized, path = lowered[8]
    model = onnx.load(path)
    onnx.checker.check_model(model)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, layer in quantized.layers.items():
        weight = stored[f"{name}.weight"]
        assert weight.dtype == np.int8
        integers = layer.weight.numpy()
        assert weight.tobytes() in (integers.tobytes(), integers.T.tobytes())
        biases = stored[f"{name}.bias_integers"]
        assert biases.dtype == np.int32 and np.array_equal(biases, layer.bias_integers.numpy())
        assert np.allclose(biases * stored[f"{name}.bias_scale"], layer.bias.numpy(), rtol=1e-6)
    for array in stored.values():
        assert array.size <= 8 or array.dtype != np.float32  # only scales are float


def extreme(layer: nn.Module) -> nn.Module:
    """`layer` with weights of one magnitude, in the first two channels also of one sign."""
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
@pytest.mark.parametrize("overflow_fix", ["activations", "weights"])
@torch.no_grad()
def test_kernels_compute_what_the_integers_say(tmp_path, name, overflow_fix):
    """Large weights and inputs: a sum of products in too few bits is far off."""
    images = torch.rand(4, 3, 224, 224)
    images[:2] = images[:2].round()
    images[2] = 1
    model = nn.Sequential(extreme(EXTREME[name]), nn.MaxPool2d(4)).eval()
    recipe = RECIPE.replace(overflow_fix=overflow_fix)
    quantized = ptq(model, images, recipe, ENGINE.qdq_config(recipe))
    assert quantized.layers["0"].weight.abs().min() == quantized.layers["0"].high
    ENGINE.lower(quantized, tmp_path / "artifact.onnx")
    assert ENGINE.kernels(tmp_path / "artifact.onnx")["integer_layers"] == 1
    difference = answers(tmp_path / "artifact.onnx", [images]) - execute(quantized, images)
    assert difference.abs().max() < 1.01 * quantized.qdq("qdq__0").scale


def test_modules_kept_in_fp32_compute_between_integers(model, images, tmp_path):
    """By default, ONNX Runtime quantizes float weights between Q/DQ pairs, with one scale."""
    recipe = RECIPE.replace(keep_fp32=("conv", "norm", "reduce", "fc"))
    quantized = ptq(model, images, recipe, ENGINE.qdq_config(recipe))
    ENGINE.lower(quantized, tmp_path / "artifact.onnx")
    kernels = ENGINE.kernels(tmp_path / "artifact.onnx")
    assert (kernels["layers"], kernels["integer_layers"]) == (LAYERS, LAYERS - 3)
    counts = kernels["operators"]
    assert (counts["QLinearConv"], counts["QGemm"]) == (4, 1)
    assert counts.get("Conv", 0) + counts.get("FusedConv", 0) == 2 and counts["Gemm"] == 1
    exact = execute(quantized, images).numpy()
    assert metrics.sqnr_db(exact, answers(tmp_path / "artifact.onnx", [images]).numpy()) > 70


# ---- FP16


def test_fp16_answers_as_fp32_within_its_resolution(model, images, tmp_path):
    deployed = ENGINE.deploy_half(model)
    assert {numbers.bits for numbers in deployed.stored} == {16}
    assert not isinstance(deployed, Lowered)
    deployed.save(path := tmp_path / "half.onnx")
    formats = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert formats - {onnx.TensorProto.INT64} == {onnx.TensorProto.FLOAT16}
    with torch.inference_mode():
        assert metrics.sqnr_db(model(images).numpy(), ENGINE.load(path, "cpu")(images).numpy()) > 50


def test_qat_of_fp16_deploys_the_network_that_was_rounded_in_training(model, images, tmp_path):
    half = registry.get("half")
    assert ENGINE.training_config(FP16_QAT) == half.training_config(FP16_QAT)
    network = ENGINE.prepare(model, images, FP16_QAT)
    with torch.no_grad():
        network.head.bias.fill_(5.0)
        expected = network(images)
    path = tmp_path / "artifact.onnx"
    ENGINE.convert(network.eval(), model, FP16_QAT).save(path)
    assert metrics.sqnr_db(expected.numpy(), answers(path, [images]).numpy()) > 40


# ---- INT16


def test_int16_answers_as_its_exact_execution(lowered, images):
    quantized, path = lowered[16]
    assert quantized.config.activation is torch.int16
    exact = execute(quantized, images).numpy()
    assert metrics.sqnr_db(exact, answers(path, images.split(24)).numpy()) > 70


# ---- the backend


@pytest.mark.parametrize("vnni", [True, False])
def test_sums_overflow_without_vnni(monkeypatch, vnni):
    monkeypatch.setattr(environment, "has_vnni", lambda *names: vnni or not names)
    assert ENGINE.default_config(8).overflow == ("none" if vnni else "all")
    assert ENGINE.default_config(16).overflow == "none"  # between Q/DQ pairs it computes in FP32


def test_a_missing_package_is_named(monkeypatch):
    assert ENGINE.problem() is None
    find = importlib.util.find_spec
    missing = ("onnxruntime", "onnxscript")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    names = "onnxruntime, onnxscript"
    assert ENGINE.problem() == f"not installed: {names} (pip install -r requirements.txt)"


def test_torch_does_not_run_the_deployed_network(model, images):
    deployed = deployed_on("onnxruntime", model, images[:2], RECIPE)
    assert deployed.predict is None and deployed.network is None and deployed.quantized is not None
    assert deployed.facts["quantized"] == sorted(deployed.quantized.layers)
    assert deployed.facts["placement"] == ENGINE.qdq_config(RECIPE).describe()


def test_a_session_has_the_threads_of_this_process(lowered):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            options = ENGINE.session(lowered[8][1]).get_session_options()
            assert options.intra_op_num_threads == threads
    finally:
        torch.set_num_threads(before)
