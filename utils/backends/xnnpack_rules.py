"""The rules of XNNPACK for quantized networks, checked without XNNPACK.

It knows int8 with one scale for each tensor. Pooling and flattening must keep the scale and
zero-point of what they read. A step of an operator's products must be less than 256 steps of its
output; XNNPACK refuses a file that breaks any of these rules. The least step, in contrast, is only
asserted: where XNNPACK is built with assertions, breaking that rule ends the process.
"""

import torch
from torch import fx
from torch.export import ExportedProgram

from utils.quantize.decomposed_ops import OPS

ATEN = torch.ops.aten
WEIGHTED_OPS = (ATEN.conv2d.default, ATEN.conv2d.padding, ATEN.linear.default)
MOVING_OPS = (  # they change no value
    ATEN.max_pool2d.default,
    ATEN.reshape.default,
    ATEN.view.default,
    ATEN.flatten.using_ints,
)
RELU = (ATEN.relu.default, ATEN.relu_.default)
ADD, MULTIPLY = (ATEN.add.Tensor, ATEN.add_.Tensor), (ATEN.mul.Tensor, ATEN.mul_.Tensor)
# A step of an operator's products in steps of its output: below the first, from the others on.
MAX_STEP_RATIO = 256
MIN_WEIGHTED_RATIO, MIN_SUM_RATIO, MIN_PRODUCT_RATIO = 2.0**-32, 2.0**-10, 2.0**-16


def violations(program: ExportedProgram) -> list[str]:
    """Return what XNNPACK would refuse in an exported network, one line each; [] if nothing."""
    lines = []
    for node in program.graph.nodes:
        if node.target is OPS.quantize_per_channel.default:
            name = node.args[0].name
            lines.append(f"{name} has a scale for each channel; XNNPACK wants one for each tensor")
        elif node.target is OPS.quantize_per_tensor.default:
            problem = _number_problem(node) or _operator_problem(program, node)
            lines += [problem] if problem else []
    return lines


def _operator(quantize: fx.Node) -> fx.Node:
    """Return the operator whose output `quantize` quantizes, without the ReLU after it."""
    node = quantize.args[0]
    return node.args[0] if node.target in RELU else node


def _number_problem(quantize: fx.Node) -> str | None:
    """Return what XNNPACK would refuse about the numbers of a quantization."""
    name, scale, dtype = _operator(quantize).name, quantize.args[1], quantize.args[5]
    if dtype != torch.int8:
        return f"{name} is quantized to {str(dtype).removeprefix('torch.')}; XNNPACK knows int8"
    if not torch.finfo(torch.float32).tiny <= scale < float("inf"):
        return f"{name} has the scale {scale:g}, which is not a normal number"
    return None


def _operator_problem(program: ExportedProgram, quantize: fx.Node) -> str | None:
    """Return what XNNPACK would refuse about the operator before a quantization."""
    node, numbers = _operator(quantize), quantize.args[1:3]
    read = []  # scale and zero-point of what the operator reads
    for source in node.all_input_nodes:
        if source.target is OPS.dequantize_per_tensor.default:
            read.append(source.args[1:3])
    if node.target in MOVING_OPS and read and read[0] != numbers:
        change = f"from {read[0]} to {numbers}"
        return f"{node.name} changes scale and zero-point {change}; both must remain"
    name, ratios, least = _ratios(program, node, [scale for scale, _ in read], numbers[0])
    for ratio in ratios:
        if not least <= ratio < MAX_STEP_RATIO:
            return (
                f"{name}: a step of its input is {ratio:.4g} steps of its output, "
                f"not {least:.1e} to {MAX_STEP_RATIO}"
            )
    return None


def _ratios(
    program: ExportedProgram, node: fx.Node, inputs: list[float], output: float
) -> tuple[str, list[float], float]:
    """Return the name of an operator, its steps in steps of its output, and their least value.

    `inputs` are the scales of its quantized inputs, and `output` is the scale of its output. An
    operator without a rule has no steps.
    """
    if node.target in WEIGHTED_OPS and inputs:
        weight = node.args[1]
        if weight.target is OPS.dequantize_per_channel.default:
            name, _ = _tensor(program, weight.args[0])
            _, scales = _tensor(program, weight.args[1])
            return name, (inputs[0] * scales / output).tolist(), MIN_WEIGHTED_RATIO
    elif node.target in ADD and len(inputs) == 2:
        return node.name, [scale / output for scale in inputs], MIN_SUM_RATIO
    elif node.target in MULTIPLY and len(inputs) == 2:
        return node.name, [inputs[0] * inputs[1] / output], MIN_PRODUCT_RATIO
    return node.name, [], 0.0


def _tensor(program: ExportedProgram, node: fx.Node) -> tuple[str, torch.Tensor]:
    """Return the name and the value of the parameter or buffer that `node` stands for."""
    signature = program.graph_signature
    name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}[node.name]
    return name, (program.state_dict | program.constants)[name]
