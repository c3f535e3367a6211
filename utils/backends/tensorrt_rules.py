"""The rules of TensorRT for quantized ONNX graphs, checked without TensorRT.

TensorRT computes a convolution or matrix product on integers only where the graph quantizes its
input and its weight as these rules say. At best, TensorRT refuses a graph that breaks them. It
builds most of them silently: TensorRT-RTX 1.7 even builds a graph whose integers are unsigned.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")
QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")
INT8 = np.dtype(np.int8)


@dataclass(frozen=True)
class _Graph:
    """A graph by the names of its tensors."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    source: dict[str, onnx.NodeProto]  # by output; inputs and initializers have none

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "_Graph":
        nodes = list(model.graph.node)
        constants = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        for node in nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        return cls(nodes, constants, {output: node for node in nodes for output in node.output})

    def type(self, tensor: str) -> str | None:
        """Return the operator that computes `tensor`; None for inputs and initializers."""
        return self.source[tensor].op_type if tensor in self.source else None

    def constant(self, node: onnx.NodeProto, position: int) -> np.ndarray | None:
        """Return the value of an input of `node`; None if it is absent or computed."""
        return self.constants.get(_input(node, position))


def violations(model: onnx.ModelProto) -> list[str]:
    """Return how the graph of `model` breaks TensorRT's rules, one line each; [] if it does not.

    The rules: integers are int8 with zero-point 0; an activation has one positive scale, the same
    where it is quantized and dequantized; a weight has a scale for each output channel; a layer's
    input and weight are both quantized, or neither; biases are floating-point; a ReLU follows its
    layer directly. Layers that are not quantized at all break no rule.
    """
    graph = _Graph.of(model)
    lines = []
    for node in graph.nodes:
        if node.op_type in QDQ_OPS:
            lines += [f"{_label(node)}: {problem}" for problem in _of_qdq(graph, node)]
        elif node.op_type in WEIGHTED_OPS:
            lines += [f"{_label(node)}: {problem}" for problem in _of_layer(graph, node)]
        elif node.op_type == "Relu" and (layer := _separated(graph, node)) is not None:
            lines.append(
                f"{_label(node)}: a pair of Q and DQ stands between it and {_label(layer)}; "
                "it belongs after the ReLU"
            )
    return lines


def _of_qdq(graph: _Graph, node: onnx.NodeProto) -> list[str]:
    """Return what is wrong with the numbers of a quantization or dequantization."""
    problems = []
    scale, zero_point = graph.constant(node, 1), graph.constant(node, 2)
    if scale is None or not (np.isfinite(scale).all() and (scale > 0).all()):
        problems.append("its scale is not a positive constant")
    dtype = _integers(graph, node)
    if dtype != INT8:
        problems.append(f"its integers are {'not known' if dtype is None else dtype}, not int8")
    if _input(node, 2) and (zero_point is None or zero_point.any()):
        problems.append("its zero-point is not 0")
    if _weight(graph, node):
        return problems
    if scale is not None and scale.size > 1:
        problems.append(f"the activation {node.input[0]} has {scale.size} scales, not one")
    if node.op_type == "DequantizeLinear":
        before = graph.source.get(node.input[0])
        if before is None or before.op_type != "QuantizeLinear":
            problems.append(f"{node.input[0]} is not the output of a quantization")
        elif scale is not None and not np.array_equal(scale, graph.constant(before, 1)):
            problems.append(f"its scale is not the scale of {_label(before)}")
    return problems


def _of_layer(graph: _Graph, node: onnx.NodeProto) -> list[str]:
    """Return what is wrong with the inputs of a convolution or matrix product."""
    problems = []
    quantized = [graph.type(tensor) == "DequantizeLinear" for tensor in node.input[:2]]
    if quantized == [True, False]:
        problems.append("its input is quantized, its weight is not")
    if quantized == [False, True]:
        problems.append("its weight is quantized, its input is not")
    if graph.type(_input(node, 2)) == "DequantizeLinear":
        problems.append("its bias is quantized; TensorRT adds it in floating point")
    if not quantized[1]:
        return problems
    qdq = graph.source[node.input[1]]
    weight, scale, axis = _weight_of(graph, qdq), graph.constant(qdq, 1), _output_axis(node)
    if weight is None or scale is None:
        return problems  # two activations, or a scale that `_of_qdq` reports
    if scale.ndim == 0 or scale.size == 1 != weight.shape[axis]:
        return [*problems, "its weight has one scale, not one for each output channel"]
    along = _attribute(qdq, "axis", 1) % weight.ndim
    if along != axis:
        problems.append(
            f"the scales of its weight are along axis {along}; its output channels are axis {axis}"
        )
    elif scale.shape != (weight.shape[axis],):
        problems.append(
            f"its weight has {scale.size} scales for {weight.shape[axis]} output channels"
        )
    return problems


def _separated(graph: _Graph, relu: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the layer whose output is quantized before `relu` reads it, if there is one."""
    node, passed = graph.source.get(relu.input[0]), 0
    while node is not None and node.op_type in QDQ_OPS:
        node, passed = graph.source.get(node.input[0]), passed + 1
    return node if node is not None and passed and node.op_type in WEIGHTED_OPS else None


def _weight_of(graph: _Graph, qdq: onnx.NodeProto) -> np.ndarray | None:
    """Return the constant that a (de)quantization starts from; None if it is an activation."""
    before = graph.source.get(qdq.input[0])
    if before is not None and before.op_type == "QuantizeLinear":
        return graph.constant(before, 0)
    return graph.constant(qdq, 0)


def _weight(graph: _Graph, node: onnx.NodeProto) -> bool:
    return _weight_of(graph, node) is not None


def _integers(graph: _Graph, node: onnx.NodeProto) -> np.dtype | None:
    """Return the integer format of a quantization or dequantization; None if it is unknown."""
    zero_point = graph.constant(node, 2)
    if zero_point is not None:
        return zero_point.dtype
    if node.op_type == "QuantizeLinear":
        given = _attribute(node, "output_dtype", 0)
        return helper.tensor_dtype_to_np_dtype(given or onnx.TensorProto.UINT8)
    integers = graph.constant(node, 0)
    if integers is not None:
        return integers.dtype
    before = graph.source.get(node.input[0])
    follows = before is not None and before.op_type == "QuantizeLinear"
    return _integers(graph, before) if follows else None


def _output_axis(layer: onnx.NodeProto) -> int:
    """Return the axis of a layer's weight along which its output channels lie."""
    if layer.op_type == "Conv":
        return 0
    return 0 if _attribute(layer, "transB", 0) else 1


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _input(node: onnx.NodeProto, position: int) -> str:
    return node.input[position] if position < len(node.input) else ""


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.output[0]}"
