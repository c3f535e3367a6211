"""TensorRT's rules: good graphs break none, and each broken rule is named."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from utils.backends import onnx_export, tensorrt, tensorrt_rules
from utils.errors import UserError

CHANNELS = 4
NUMBERS = {  # of the good graph
    "scale": np.float32(0.02),
    "after": np.float32(0.05),
    "zero": np.int8(0),
    "weight": np.arange(CHANNELS * 3 * 9, dtype=np.int8).reshape(CHANNELS, 3, 3, 3),
    "steps": np.full(CHANNELS, 0.01, np.float32),
    "zeros": np.zeros(CHANNELS, np.int8),
    "bias": np.ones(CHANNELS, np.float32),
    "head": np.arange(2 * CHANNELS, dtype=np.int8).reshape(2, CHANNELS),
    "head_steps": np.full(2, 0.01, np.float32),
    "head_zeros": np.zeros(2, np.int8),
}


def qdq(x, scale="scale", zero="zero", name=None, scale_back=None, **attributes):
    """A quantization of `x` and its dequantization, whose output is `name`."""
    name = name or f"{x}_rounded"
    integers = f"{name}_integers"
    back = [integers, scale_back or scale, zero]
    return [
        helper.make_node("QuantizeLinear", [x, scale, zero], [integers], **attributes),
        helper.make_node("DequantizeLinear", back, [name], **attributes),
    ]


def dequantized(name, output, axis):
    """The integers `name`, of the head or any weight with its scales, as values `output`."""
    inputs = {"head": ["head", "head_steps", "head_zeros"]}.get(name, [name, "steps", "zeros"])
    return [helper.make_node("DequantizeLinear", inputs, [output], axis=axis)]


def nodes(first=None, weight=None, conv=None, relu=None, head=None):
    """The operators of the good graph; each argument replaces a part of them."""
    inputs = ["images_rounded", "w", "bias"]
    return [
        *(first or qdq("images")),
        *(weight or dequantized("weight", "w", 0)),
        *(conv or [helper.make_node("Conv", inputs, ["conv"], kernel_shape=[3, 3])]),
        *(relu or [helper.make_node("Relu", ["conv"], ["relu"])]),
        helper.make_node("GlobalAveragePool", ["relu"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        *qdq("flat", "after"),
        *(head or dequantized("head", "h", 0)),
        helper.make_node("Gemm", ["flat_rounded", "h"], ["logits"], transB=1),
    ]


def model(operators=None, **numbers):
    """A convolution, its ReLU, a mean over all positions and a linear layer.

    `numbers` replace some of NUMBERS.
    """
    constants = []
    for name, value in (NUMBERS | numbers).items():
        constants.append(numpy_helper.from_array(np.asarray(value), name))
    shape = ["n", 3, tensorrt.SIDE, tensorrt.SIDE]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph(operators or nodes(), "small", [images], [logits], constants)
    opset = helper.make_opsetid("", onnx_export.OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def quantized_bias():
    """The good graph with a bias of integers."""
    bias = helper.make_node("DequantizeLinear", ["bias", "bias_steps"], ["b"], axis=0)
    inputs = ["images_rounded", "w", "b"]
    conv = helper.make_node("Conv", inputs, ["conv"], kernel_shape=[3, 3])
    operators = nodes(conv=[bias, conv])
    steps = np.full(CHANNELS, 2e-4, np.float32)
    return model(operators, bias=np.ones(CHANNELS, np.int32), bias_steps=steps)


def wrong_axis():
    """The good graph with weights that have a scale for each input channel."""
    operators = nodes(weight=dequantized("weight", "w", 1))
    return model(operators, steps=np.full(3, 0.01, np.float32), zeros=np.zeros(3, np.int8))


def wrong_axis_of_head():
    """The good graph with a linear layer that has a scale for each input channel."""
    steps, zeros = np.full(4, 0.01, np.float32), np.zeros(4, np.int8)
    return model(nodes(head=dequantized("head", "h", 1)), head_steps=steps, head_zeros=zeros)


def scales_of_channels():
    """The good graph with a scale for each channel of the images."""
    operators = nodes(first=qdq("images", "scales", "zeros3", axis=1))
    return model(operators, scales=np.full(3, 0.02, np.float32), zeros3=np.zeros(3, np.int8))


WEIGHT = numpy_helper.to_array(numpy_helper.from_array(NUMBERS["weight"])).astype(np.float32)
# The fault, the graph, the line of the rules, and whether TensorRT-RTX 1.7 builds it nevertheless.
BROKEN = [
    ("unsigned", lambda: model(zero=np.uint8(0)), "its integers are uint8, not int8", True),
    ("unsigned and shifted", lambda: model(zero=np.uint8(128)), "its zero-point is not 0", False),
    ("no zero-point", lambda: model(nodes(first=[
        helper.make_node("QuantizeLinear", ["images", "scale"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["images_rounded"]),
    ])), "its integers are uint8, not int8", True),
    ("shifted", lambda: model(zero=np.int8(3)), "its zero-point is not 0", False),
    ("shifted weight", lambda: model(zeros=np.int8([0, 0, 1, 0])),
     "DequantizeLinear w: its zero-point is not 0", False),
    ("quantized bias", quantized_bias, "its bias is quantized", False),
    ("pair before ReLU", lambda: model(nodes(
        relu=[*qdq("conv"), helper.make_node("Relu", ["conv_rounded"], ["relu"])]
    )), "Relu relu: a pair of Q and DQ stands between it and Conv conv", True),
    ("one scale of a weight", lambda: model(steps=np.float32(0.01), zeros=np.int8(0)),
     "its weight has one scale", True),
    ("wrong axis", wrong_axis, "along axis 1; its output channels are axis 0", True),
    ("wrong axis of a linear layer", wrong_axis_of_head,
     "Gemm logits: the scales of its weight", True),
    ("float weight", lambda: model(nodes(
        weight=[helper.make_node("Identity", ["weight"], ["w"])]
    ), weight=WEIGHT), "its input is quantized, its weight is not", True),
    ("float input", lambda: model(nodes(
        first=[helper.make_node("Identity", ["images"], ["images_rounded"])]
    )), "its weight is quantized, its input is not", True),
    ("scales of channels", scales_of_channels,
     "the activation images has 3 scales, not one", True),
    ("two scales in a pair", lambda: model(nodes(first=qdq("images", scale_back="after"))),
     "its scale is not the scale of", True),
    ("scale of 0", lambda: model(scale=np.float32(0)),
     "its scale is not a positive constant", False),
    ("quantized nowhere", lambda: model(nodes(first=[
        helper.make_node("Cast", ["images"], ["q"], to=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["images_rounded"]),
    ])), "q is not the output of a quantization", True),
]  # fmt: skip
NAMES = [name for name, *_ in BROKEN]


def float_model():
    operators = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head"], ["logits"], transB=1),
    ]
    return model(operators, weight=WEIGHT, head=NUMBERS["head"].astype(np.float32))


def rounded_weights():
    """The good graph with float weights that it quantizes, as fake quantization leaves it."""
    weight = qdq("weight", "steps", "zeros", name="w", axis=0)
    return model(nodes(weight=weight), weight=WEIGHT)


def other_linear_layers():
    """A Gemm without transposition and a MatMul: output channels are the last axis of weights."""
    square = ["square", "head_steps", "head_zeros"]
    operators = [
        *nodes(head=dequantized("head", "h", 1))[:-1],
        helper.make_node("Gemm", ["flat_rounded", "h"], ["hidden"]),
        *qdq("hidden"),
        helper.make_node("DequantizeLinear", square, ["s"], axis=-1),
        helper.make_node("MatMul", ["hidden_rounded", "s"], ["logits"]),
    ]
    return model(operators, head=NUMBERS["head"].T.copy(), square=np.ones((2, 2), np.int8))


def half_model():
    """The good graph with FP16 in place of FP32."""
    floats = {name: value for name, value in NUMBERS.items() if value.dtype == np.float32}
    numbers = {name: value.astype(np.float16) for name, value in floats.items()}
    cast = helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT16)
    operators = nodes(first=[cast, *qdq("x", name="images_rounded")])
    operators[-1].output[0] = "half"
    back = helper.make_node("Cast", ["half"], ["logits"], to=TensorProto.FLOAT)
    return model([*operators, back], **numbers)


GOOD = [model, float_model, rounded_weights, other_linear_layers, half_model]


def refused(made, folder):
    """Whether TensorRT-RTX refuses a graph; if so, it must say why."""
    pytest.importorskip("tensorrt_rtx")
    onnx.save(made, folder / "graph.onnx")
    try:
        assert tensorrt.build("tensorrt_rtx", folder / "graph.onnx")
    except UserError as error:
        assert "no reason given" not in str(error)
        return True
    return False


@pytest.mark.parametrize("make", GOOD)
def test_a_good_graph_breaks_no_rule(make):
    assert tensorrt_rules.violations(make()) == []


@pytest.mark.parametrize(("make", "line"), [case[1:3] for case in BROKEN], ids=NAMES)
def test_each_broken_rule_is_named(make, line):
    assert any(line in said for said in tensorrt_rules.violations(make()))


@pytest.mark.parametrize("make", GOOD)
def test_tensorrt_builds_the_good_graphs(make, tmp_path):
    assert not refused(make(), tmp_path)


@pytest.mark.parametrize(("make", "builds"), [(case[1], case[3]) for case in BROKEN], ids=NAMES)
def test_tensorrt_refuses_only_some_of_the_broken_graphs(make, builds, tmp_path):
    assert refused(make(), tmp_path) != builds
