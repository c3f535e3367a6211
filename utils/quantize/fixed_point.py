"""INT16 networks, simulated in FP32 because no engine here has 16-bit integer kernels.

Every weight is one of 65,535 integers and every activation one of 65,536, exactly as on integer
hardware. Only sums are rounded differently: FP32 keeps 24 bits, hardware keeps more. Accuracy and
size are therefore those of INT16; speed is never claimed.

The scheme is that of Jacob et al. 2018 (arXiv:1712.05877) at 16 bits, symmetric. Weights have one
scale per output channel. Biases have 32 bits at the scale of the products. Activations have one
scale per tensor, or one per channel if no operator that reads the tensor adds channels up.
Activation functions, depthwise convolutions, means over positions, and sums and products of tensors
add none up: each channel has a separate accumulator there in any case.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from utils.errors import UserError
from utils.quantize import ranges
from utils.quantize.layers import WEIGHTED

BITS = 16
LOW, HIGH = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
BIAS_HIGH = 2**31 - 1
ELEMENTWISE = (nn.ReLU, nn.Hardswish, nn.Hardsigmoid, nn.AdaptiveAvgPool2d)
COMPUTING = (*WEIGHTED, *ELEMENTWISE, nn.BatchNorm2d)
FUNCTIONS = (operator.add, operator.iadd, operator.mul, torch.add, torch.mul)
# These only move or select numbers, so their output has the scale of their input.
MOVING = (nn.MaxPool2d, nn.Dropout, nn.Identity, nn.Flatten)
MOVING_FUNCTIONS = (torch.flatten, operator.getitem, getattr)
MOVING_METHODS = ("flatten", "view", "reshape", "contiguous", "size")


class Fixed(nn.Module):
    """Fake quantization of a tensor to 16 bits.

    Values are rounded to the nearest of the 65,536 multiples of `scale` that 16 bits can hold, ties
    to even. `scale` has the shape () or (1, channels, 1, 1). Gradients pass as if nothing were
    rounded, and are zero where values are clipped: the straight-through estimator of Bengio et al.
    2013 (arXiv:1308.3432).
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = torch.clamp(torch.round(x / self.scale), LOW, HIGH) * self.scale
        if not torch.is_grad_enabled():
            return rounded
        clipped = torch.clamp(x, LOW * self.scale, HIGH * self.scale)
        return clipped + (rounded - clipped).detach()


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `weight` (out, ...) symmetrically to 16 bits, with one scale per output channel.

    Returns integers, int16 (out, ...), and scales, float32 (out,). The largest magnitude of a
    channel becomes 32767; a channel of zeros has scale 1.
    """
    weight = weight.detach()
    scale = weight.abs().flatten(1).amax(1) / HIGH
    scale[scale == 0] = 1.0
    return torch.clamp(torch.round(weight / by_output(scale, weight)), -HIGH, HIGH).to(torch.int16), scale


def quantize_bias(bias: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `bias` (out,) to 32 bits at the scale of the accumulator.

    Returns integers, int32 (out,), and scales, float64 (out,). The accumulator's scale is the
    product of the scales of input and weight. At 16 bits it is so fine that 2^31 steps may not
    reach the bias; the scale is then the smallest at which the bias fits.
    """
    bias = bias.detach().double()
    scale = torch.maximum(input_scale.double() * weight_scale.double(), bias.abs() / BIAS_HIGH)
    return torch.round(bias / scale).to(torch.int32), scale


def by_output(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reshape `scale` (out,) so that it broadcasts over `weight` (out, ...)."""
    return scale.view(-1, *[1] * (weight.ndim - 1))


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return the values of the integers of `weight`, with straight-through gradients."""
    integers, scale = quantize_weight(weight)
    return weight + (integers.float() * by_output(scale, weight) - weight).detach()


class RoundedConv2d(nn.Conv2d):
    """A convolution that trains FP32 weights and computes with their rounded values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, _rounded(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """A linear layer that trains FP32 weights and computes with their rounded values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _rounded(self.weight), self.bias)


def insert(graph: fx.GraphModule, make) -> dict[str, str]:
    """Insert a module `make()` after the input and after each computing operator of `graph`.

    Changes `graph` in place. A layer directly followed by BatchNorm or ReLU is computed together
    with it, as on hardware, so one module follows the whole sequence. Returns, for each weighted
    layer by name, the name of the inserted module whose output it reads; operators between the two
    only move numbers. Raises `UserError` for an operator that is known neither to compute nor to
    move numbers, because its output would stay unrounded.
    """
    modules = dict(graph.named_modules())
    reads: dict[str, str] = {}
    after: dict[fx.Node, str] = {}
    for node in list(graph.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, WEIGHTED):
            reads[node.target] = after[node.args[0]]
        if _computes(node, module) and not _absorbed(node, modules):
            name = f"after_{node.name}"
            graph.add_submodule(name, make())
            with graph.graph.inserting_after(node):
                new = graph.graph.call_module(name, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            after[new] = name
        elif node.args and node.args[0] in after:
            after[node] = after[node.args[0]]
    graph.recompile()
    return reads


def _computes(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a node's output must be rounded; raise `UserError` if it is unknown."""
    match node.op:
        case "placeholder":
            return True
        case "call_module" if isinstance(module, (*COMPUTING, *MOVING)):
            return isinstance(module, COMPUTING)
        case "call_function" if node.target in (*FUNCTIONS, *MOVING_FUNCTIONS):
            return node.target in FUNCTIONS
        case "call_method" if node.target in MOVING_METHODS:
            return False
        case "output":
            return False
    name = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
    raise UserError(
        f"INT16 does not know the operator {name} ({node.name}), so it would stay unrounded. Add it to COMPUTING or MOVING in "
        "utils/quantize/fixed_point.py, with a test."
    )


def _absorbed(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether an operator is computed together with a BatchNorm or ReLU after it."""
    users = list(node.users)
    fusible = len(users) == 1 and users[0].op == "call_module" and isinstance(modules[users[0].target], nn.ReLU | nn.BatchNorm2d)
    return fusible and node.op != "placeholder"


def channelwise(graph: fx.GraphModule, kind: type[nn.Module]) -> set[str]:
    """Return the names of the modules of `kind` whose output no reader adds up over channels."""
    modules = dict(graph.named_modules())

    def apart(node: fx.Node) -> bool:
        return all(map(reads_apart, node.users))

    def reads_apart(user: fx.Node) -> bool:
        module = modules.get(user.target) if user.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            return module.groups == module.in_channels == module.out_channels
        if isinstance(module, nn.MaxPool2d | nn.Dropout | nn.Identity):  # channels stay in place
            return apart(user)
        return isinstance(module, ELEMENTWISE) or user.target in FUNCTIONS

    nodes = [node for node in graph.graph.nodes if node.op == "call_module" and isinstance(modules[node.target], kind)]
    return {node.target for node in nodes if apart(node)}


def folded(model: nn.Module) -> fx.GraphModule:
    """Copy `model` to the CPU in evaluation mode, with BatchNorm folded into convolutions."""
    return fuse(copy.deepcopy(model).cpu().eval())


def activation_scales(network: fx.GraphModule, images: torch.Tensor, recipe: dict) -> dict[str, torch.Tensor]:
    """Calibrate the activation scales of `network` on `images` (n, 3, 224, 224), normalised.

    Returns the scales by the names of the rounding modules: float32, shape () or, for channels that
    are never added up, (1, channels, 1, 1). Recipe: `activations`, a method of `ranges.LIMITS`, and
    `headroom`, a factor on its ranges. A headroom of 4 costs two bits, which does less harm than
    clipping values beyond the calibrated range.
    """
    observed = copy.deepcopy(network).eval()
    insert(observed, ranges.Magnitudes)
    for name in channelwise(observed, ranges.Magnitudes):
        observed.get_submodule(name).channelwise = True
    observers = ranges.magnitudes(observed, images, recipe["activations"])
    return {name: recipe["headroom"] * observer.limit(recipe["activations"], BITS) / HIGH for name, observer in observers.items()}


def integers(reference: fx.GraphModule, scales: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the numbers of the INT16 network, as tensors in a dict of dicts.

    weight, weight_scale, bias and bias_scale are by layer, activation_scale is by rounding module.
    `reference` is a `folded` network; `scales` are its `activation_scales`.
    """
    content = {"activation_scale": scales, "weight": {}, "weight_scale": {}, "bias": {}, "bias_scale": {}}
    for name, source in insert(copy.deepcopy(reference), Fixed).items():
        layer = reference.get_submodule(name)
        content["weight"][name], content["weight_scale"][name] = quantize_weight(layer.weight)
        if layer.bias is not None:
            bias = quantize_bias(layer.bias, scales[source].flatten(), content["weight_scale"][name])
            content["bias"][name], content["bias_scale"][name] = bias
    return content


def trainable(model: nn.Module, images: torch.Tensor, recipe: dict) -> fx.GraphModule:
    """Return a trainable graph of `model` with rounded weights and activations.

    Parameters keep their names. BatchNorm is not folded, so that it trains as in the control. The
    integers are the same as with folding, which multiplies a channel's weights by one number: the
    channel's scale absorbs it. Activation ranges stay as calibrated on `images` (n, 3, 224, 224).
    """
    network = fx.symbolic_trace(copy.deepcopy(model).train())
    scales = activation_scales(network, images, recipe)
    insert(network, Fixed)
    for name, scale in scales.items():
        network.get_submodule(name).scale = scale
    for module in network.modules():
        if isinstance(module, WEIGHTED):  # the same parameters, another forward()
            module.__class__ = RoundedConv2d if isinstance(module, nn.Conv2d) else RoundedLinear
    return network


def assemble(model: nn.Module, content: dict) -> nn.Module:
    """Build the INT16 network from the numbers that `integers` returned.

    It is in evaluation mode. Only the structure of `model` is used, not its weights.
    """
    network = folded(model)
    reads = insert(network, Fixed)
    for name, scale in content["activation_scale"].items():
        network.get_submodule(name).scale = scale
    for name in reads:
        layer = network.get_submodule(name)
        layer.weight.data = content["weight"][name].float() * by_output(content["weight_scale"][name], layer.weight)
        if layer.bias is not None:
            layer.bias.data = (content["bias"][name].double() * content["bias_scale"][name]).float()
    return network.eval().to(memory_format=torch.channels_last)
