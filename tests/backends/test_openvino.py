"""OpenVINO: answers, precisions and kernels, read from the network that it compiled."""

import importlib.util

import onnx
import pytest
import torch
from helpers import mobilenet_checkpoint
from small_networks import RECIPE, Mixed, Sum, images, quantized

from utils import architectures
from utils.backends.openvino import ENGINES, around_zero, shorten
from utils.errors import UserError
from utils.metrics import sqnr_db
from utils.quantize.exact import execute
from utils.quantize.operators import folded

openvino = pytest.importorskip("openvino")
ENGINE = ENGINES["openvino"]


@pytest.fixture(scope="module")
def artifact(integers, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / f"mixed{ENGINE.suffix}"
    ENGINE.lower(integers, path)
    return path


@pytest.fixture(scope="module")
def floats(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp32") / f"mixed{ENGINE.suffix}"
    ENGINE.lower_half(folded(model), path)
    return path


def test_fp32_answers_as_torch_for_any_batch_size_in_any_order(model, floats):
    predict = ENGINE.load(floats, "cpu")
    for count in (1, 3, 1):
        with torch.no_grad():
            expected = model(images(count))
        torch.testing.assert_close(predict(images(count)), expected, rtol=1e-4, atol=1e-4)


def test_fp32_of_a_study_model_comes_from_its_checkpoint(tmp_path):
    baseline = mobilenet_checkpoint(tmp_path / "mobilenetv3_fp32_seed0.pt")
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = baseline.model(x)
    assert expected.abs().max() > 1e-3
    logits, atol = ENGINE.load(baseline.path, "cpu")(x), 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=atol)
    assert ENGINE.kernels(baseline.path)["integer_layers"] == 0


def test_int8_answers_as_exact_execution(integers, artifact):
    logits, exact = ENGINE.load(artifact, "cpu")(images()), execute(integers, images())
    assert sqnr_db(exact.numpy(), logits.numpy()) > 35


def test_all_layers_max_pooling_and_sums_run_on_integers_the_rest_in_fp32(artifact):
    kernels = ENGINE.kernels(artifact)
    assert kernels["layers"] == kernels["integer_layers"] == Mixed.LAYERS
    assert sum(kernels["kernels"].values()) == Mixed.LAYERS
    assert set(kernels["precisions"]) == {"f32", "u8"}


def test_layers_kept_in_fp32_are_not_counted_as_integer(model, tmp_path):
    config, keep_fp32 = ENGINE.qdq_config(RECIPE), ("depthwise", "head.4")
    network = quantized(model, config, images(), keep_fp32=keep_fp32)
    ENGINE.lower(network, tmp_path / "artifact")
    kernels = ENGINE.kernels(tmp_path / "artifact")
    assert (kernels["layers"], kernels["integer_layers"]) == (Mixed.LAYERS, Mixed.LAYERS - 2)


def test_fp32_has_no_integer_kernels(floats):
    kernels = ENGINE.kernels(floats)
    assert kernels["layers"] > 0 == kernels["integer_layers"]
    assert set(kernels["precisions"]) == {"f32"}


def test_pairs_stand_at_the_inputs_of_layers_and_weights_are_stored_in_int8(artifact):
    graph = onnx.load(artifact).graph
    kinds = [node.op_type for node in graph.node]
    qdqs = Mixed.LAYERS + 2  # also after max pooling, and for the summand that no layer reads
    assert kinds.count("QuantizeLinear") == qdqs
    assert kinds.count("DequantizeLinear") == qdqs + Mixed.LAYERS
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) > 1]
    assert [tensor.data_type for tensor in weights] == [onnx.TensorProto.INT8] * Mixed.LAYERS


def test_hardswish_stays_one_operator(artifact, floats):
    for path in (artifact, floats):
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert (kinds.count("HardSwish"), kinds.count("HardSigmoid")) == (Mixed.HARDSWISHES, 1)
        operators = openvino.Core().read_model(path).get_ops()
        kinds = [operator.get_type_name() for operator in operators]
        assert (kinds.count("HSwish"), kinds.count("HardSigmoid")) == (Mixed.HARDSWISHES, 1)


def test_numbers_around_zero_are_the_same_in_signed_integers(integers):
    signed = around_zero(integers.network)
    qdqs = {name: (integers.qdq(name), signed.get_submodule(name)) for name in integers.qdqs.source}
    changed = {name for name, (_, after) in qdqs.items() if after.dtype is torch.int8}
    if integers.config.steps == 255:
        # Noise lies around 0; the output of hardswish does not.
        assert "qdq_x" in changed and "qdq_head_1" not in changed
    for name in changed:
        before, after = qdqs[name]
        assert (before.numbers[1], after.numbers[1]) == (128, 0)
        assert before.numbers[0] == after.numbers[0]
    assert torch.equal(integers.network(images()), signed(images()))


@pytest.mark.parametrize("overflow_fix", ["activations", "weights"])
def test_no_sum_overflows_on_this_cpu(tmp_path, overflow_fix):
    """All products are the largest: without VNNI, factors of 8 bits give half the answer."""
    x = torch.full((1, 3, 224, 224), 2.0)
    config = ENGINE.qdq_config(RECIPE.replace(overflow_fix=overflow_fix))
    ENGINE.lower(quantized(Sum(), config, x), tmp_path / "artifact")
    logits = ENGINE.load(tmp_path / "artifact", "cpu")(x)
    torch.testing.assert_close(logits, torch.full((1, 2), 128.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("scales", "channelwise"), [("engine", True), ("tensor", False)])
def test_a_recipe_may_forbid_one_scale_per_channel_of_an_activation(model, scales, channelwise):
    config = ENGINE.qdq_config(RECIPE.replace(activation_scales=scales))
    made = quantized(model, config, images())
    assert any(made.qdq(name).numbers is None for name in made.qdqs.source) == channelwise


@pytest.mark.parametrize("vnni", [True, False])
def test_sums_overflow_without_vnni(monkeypatch, vnni):
    monkeypatch.setattr("utils.environment.has_vnni", lambda *names: vnni)
    assert ENGINE.default_config(8).overflow == ("none" if vnni else "all")


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_compiled_for_the_threads_of_torch_in_one_stream(floats, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compiled = ENGINE._compiler(floats)(1)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def stored_bytes(path):
    """Bytes of all numbers in an ONNX file, without single ones."""
    stored = [tensor for tensor in onnx.load(path).graph.initializer if tensor.dims]
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in stored)


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_short_weights_are_the_nearest_and_take_half_the_bytes(model, floats, tmp_path, precision):
    path = tmp_path / "short.onnx"
    path.write_bytes(floats.read_bytes())
    shorten(path, precision)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[precision]
    rounded = folded(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
        expected = rounded(images())
    torch.testing.assert_close(ENGINE.load(path, "cpu")(images()), expected, rtol=1e-4, atol=1e-4)
    assert stored_bytes(path) < 0.51 * stored_bytes(floats)


@pytest.mark.parametrize("name", ["openvino_fp16", "openvino_bf16"])
def test_a_precision_that_the_cpu_lacks_is_refused_and_another_is_in_the_graph(
    name, model, tmp_path
):
    engine = ENGINES[name]
    path = tmp_path / f"mixed{engine.suffix}"
    engine.lower_half(folded(model), path)
    if problem := engine.problem():
        assert problem.endswith("so OpenVINO would compute in another")
        message = f"would compute in b?f(16|32) on this CPU, not in {engine.precision}"
        with pytest.raises(UserError, match=message):
            engine.load(path, "cpu")(images())
        return
    kernels = engine.kernels(path)
    assert kernels["layers"] == Mixed.LAYERS
    assert all(kernel.endswith(engine.precision) for kernel in kernels["kernels"])
    assert kernels["precisions"][engine.precision] > 1  # hardsigmoid is always in FP32
    with torch.no_grad():
        assert sqnr_db(model(images()).numpy(), engine.load(path, "cpu")(images()).numpy()) > 25


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else object()
    )
    assert ENGINE.problem() == "not installed: openvino (pip install -r requirements-openvino.txt)"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "resnet18", "mobilenetv3"])
def test_the_networks_of_the_study_run_all_their_layers_on_integers(name, tmp_path):
    torch.manual_seed(0)
    network = architectures.build(name)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(4, 3, 224, 224))
    x = torch.randn(4, 3, 224, 224)
    integers = quantized(network.eval(), ENGINE.qdq_config(RECIPE), x)
    ENGINE.lower(integers, tmp_path / "artifact")
    kernels = ENGINE.kernels(tmp_path / "artifact")
    layers = {"alexnet": 8, "resnet18": 21, "mobilenetv3": 54}[name]
    assert kernels["layers"] == kernels["integer_layers"] == layers
    logits = ENGINE.load(tmp_path / "artifact", "cpu")(x)
    assert sqnr_db(execute(integers, x).numpy(), logits.numpy()) > 20
