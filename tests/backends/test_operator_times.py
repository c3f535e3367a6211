"""Times of operators: what an operator is for, and what each engine reports."""

import pytest
import torch
from helpers import deployed_on
from small_networks import RECIPE, Mixed, images

from utils.backends import operator_times, registry
from utils.backends.operator_times import Timed, by_kind, kind_of

WORDS = {
    "reorder": ["Reorder", "QuantizeLinear", "DequantizeLinear", "aten::quantize_per_tensor",
                "aten::dequantize", "aten::copy_", "ReorderInput", "Transpose"],
    "convolution": ["Convolution", "QLinearConv", "quantized::conv2d_relu",
                    "aten::mkldnn_convolution", "FusedConv"],
    "depthwise": ["GroupConvolution", "Convolution (NHWC, QC8) DWConv"],
    "linear": ["FullyConnected", "Fully Connected (NC, QS8, QC8W) GEMM", "QGemm", "MatMul",
               "quantized::linear", "aten::addmm", "QLinearMatMul"],
    "pooling": ["ReduceMean", "QLinearGlobalAveragePool", "aten::mean"],
    "normalisation": ["aten::native_batch_norm"],
    "activation": ["HSwish", "HardSigmoid", "aten::relu_", "quantized::hardswish"],
    "sum or product": ["QLinearAdd", "Mul", "quantized::add_relu", "Subgraph"],
    "other": ["aten::empty"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "word"), [(kind, word) for kind, words in WORDS.items() for word in words]
)
def test_an_operator_has_a_kind(kind, word):
    assert kind_of(word) == kind


def test_times_are_summed_by_kind_and_format_with_the_largest_first():
    times = [
        Timed("a", "Conv", "FP32", 1.0),
        Timed("b", "QLinearConv", "INT8", 3.0),
        Timed("c", "FusedConv", "FP32", 0.5),
    ]
    assert list(by_kind(times).items()) == [
        (("convolution", "INT8"), 3.0),
        (("convolution", "FP32"), 1.5),
    ]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.mark.parametrize("name", ["fbgemm", "onnxruntime", "openvino", "xnnpack"])
def test_an_engine_reports_its_integer_layers_and_prints_nothing(name, network, tmp_path, capfd):
    engine = registry.get(name)
    if problem := engine.problem():
        pytest.skip(problem)
    deployed = deployed_on(name, network, images(), RECIPE.replace(keep_fp32=("stem",)))
    deployed.save(tmp_path / f"artifact{engine.suffix}")
    capfd.readouterr()
    times = engine.profile(tmp_path / f"artifact{engine.suffix}", images(2), 3)
    assert capfd.readouterr() == ("", "")
    assert (
        all(operator.ms >= 0 for operator in times) and sum(operator.ms for operator in times) > 0
    )
    assert len({operator.name for operator in times}) == len(times)
    kinds = ("convolution", "depthwise", "linear")
    layers = [operator for operator in times if operator.kind in kinds]
    assert {layer.format for layer in layers} == {"INT8", "FP32"}  # the stem stays in FP32


def test_torch_reports_operators_in_the_format_of_the_backend(network):
    times = operator_times.of_torch(network, images(2), 2, "FP32")
    assert {operator.format for operator in times} == {"FP32"}
    assert {"convolution", "linear", "normalisation"} <= {operator.kind for operator in times}
