"""Fake quantization: a network that rounds in its forward pass, and learns.

Weights, biases and the ranges of activations learn. Gradients pass through rounding as if it were
absent, and are zero where values are clipped: the straight-through estimator of Bengio et al. 2013
(arXiv:1308.3432). Ranges learn at both ends, as in LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576).

Each parameter learns in units of its size: a weight in 1/127 of the largest weight of its channel,
a bias in RANGE_UNIT of the spread of its channel's output, the ends of a range in RANGE_UNIT of
that range. So one learning rate fits all channels, layers, networks and bit widths. Plain units
would not work: after folding and equalization, the channels of a layer differ by factors of
hundreds, and a step that hardly changes one channel moves the weights of another by several
integers.
"""

import copy
import operator

import torch
from torch import fx, nn

from utils.quantize import calibration, insertion
from utils.quantize.layers import channel_moments
from utils.quantize.modules import WeightedLayer, along_channels, by_output
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import INTEGERS, QDQConfig

WEIGHT_UNITS = 127  # from 0 to the largest weight of a channel
RANGE_UNIT = 1 / 16


class RoundActivation(torch.autograd.Function):
    """Rounding to the nearest value of a Q/DQ pair, with gradients for scale and zero-point.

    x is rounded to y, and their gradients are dx (0 where x is clipped) and dy. The gradients of
    the scale s and the zero-point z are sum(dy y - dx x) / s and s sum(dx - dy). These are the
    formulas of LSQ+, in which y - x is the rounding error and y the clipped end.

    On CPUs, a few vectorised operators are faster than one of torch's `fake_quantize` operators,
    which are not vectorised: 6 against 33 ms for 6.4 million values on 2 threads.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, limits):
        x = x.float()  # BF16 or FP16, from mixed precision, would round to other integers
        scales = along_channels(scale, x)
        integer = along_channels(zero_point.round().clamp(*limits), x)
        y = (x / scales).round_().add_(integer).clamp_(*limits).sub_(integer).mul_(scales)
        ctx.save_for_backward(x, y, scales, integer)
        ctx.limits = limits
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, scale, integer = ctx.saved_tensors
        dx = unclipped(dy, (x / scale).add_(integer), *ctx.limits)
        dims = [dim for dim in range(x.ndim) if scale.ndim == 0 or dim != 1]
        of_scale = of_zero_point = None
        if ctx.needs_input_grad[1]:
            of_scale = (dy * y).addcmul_(dx, x, value=-1).sum(dims) / scale.flatten()
        if ctx.needs_input_grad[2]:
            of_zero_point = scale.flatten() * (dx.sum(dims) - dy.sum(dims))
        return dx, of_scale, of_zero_point, None


class RoundWeight(torch.autograd.Function):
    """Rounding of weights (out, ...) to integers of magnitude `highest` at most, times `unit`.

    One integer step is `step` in the numbers of the weights. `unit`, which broadcasts over the
    weights, does not learn.
    """

    @staticmethod
    def forward(ctx, weight, step, highest, unit):
        ctx.save_for_backward(weight, unit)
        ctx.ends = step, highest
        return (weight / step).round_().clamp_(-highest, highest).mul_(step * unit)

    @staticmethod
    def backward(ctx, dy):
        weight, unit = ctx.saved_tensors
        step, highest = ctx.ends
        return unclipped(dy, weight / step, -highest, highest).mul_(unit), None, None, None


class RoundHalf(torch.autograd.Function):
    """Rounding of float32 numbers to FP16, with gradients as if nothing were rounded."""

    @staticmethod
    def forward(ctx, x):
        return x.half().float()

    @staticmethod
    def backward(ctx, dy):
        return dy


def unclipped(gradient: torch.Tensor, numbers: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Return `gradient` where `numbers` round to an integer from `low` to `high`, 0 elsewhere."""
    return torch.ops.aten.hardtanh_backward(gradient, numbers, low - 0.5, high + 0.5)


class FakeQuantize(nn.Module):
    """A Q/DQ pair in float arithmetic with a range that learns at both ends.

    `stretch` and `shift`, float32 () or (channels,), start at 0.
    """

    def __init__(self, limits: tuple[int, int]):
        super().__init__()
        self.limits = limits  # lowest and highest integer
        self.assign(torch.tensor(1.0), torch.tensor(0))

    def assign(
        self,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        learns: bool = True,
        symmetric: bool = False,
    ) -> None:
        """Set the scale and the zero-point, () or (channels,), from which training starts.

        They stay constant unless the pair `learns`. The zero-point of a `symmetric` pair is always
        constant.
        """
        self.register_buffer("first_scale", scale.float())
        self.register_buffer("first_zero_point", zero_point.float())
        zeros = torch.zeros_like(scale, dtype=torch.float32)
        self.stretch = nn.Parameter(zeros, requires_grad=learns)
        self.shift = nn.Parameter(zeros.clone(), requires_grad=learns and not symmetric)

    @property
    def scale(self) -> torch.Tensor:
        """The present scale."""
        return self.first_scale * (1 + RANGE_UNIT * self.stretch)

    @property
    def zero_point(self) -> torch.Tensor:
        """The present zero-point, float32, not rounded."""
        low, high = self.limits
        return self.first_zero_point + RANGE_UNIT * (high - low) * self.shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return RoundActivation.apply(x, self.scale, self.zero_point, self.limits)


class FakeQuantizedLayer(WeightedLayer):
    """A convolution or linear layer that learns in units of its size and may round its weights.

    `weight` and `bias` are in units; the bias adds to `first_bias`. `scale` (out,) is the step
    between a channel's weights, whose integers reach from -`highest` to `highest`. If `highest` is
    None, weights are not rounded. `spread` (out,) is the standard deviation of a channel's output.
    If `half` is set, the layer reads, holds and writes FP16 numbers.
    """

    half = False

    def __init__(
        self, layer: nn.Module, scale: torch.Tensor, highest: int | None, spread: torch.Tensor
    ):
        super().__init__(layer)
        weight = layer.weight.detach()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        self.highest = highest
        self.has_bias = layer.bias is not None
        unit = scale * ((highest or WEIGHT_UNITS) / WEIGHT_UNITS)
        self.weight = nn.Parameter(weight / by_output(unit, weight))
        self.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=self.has_bias)
        self.register_buffer("unit", unit)
        self.register_buffer("first_bias", bias)
        self.register_buffer("bias_unit", RANGE_UNIT * spread)

    def float_weight(self) -> torch.Tensor:
        """Return the weights before rounding, in the network's numbers."""
        return self.weight * by_output(self.unit, self.weight)

    def used(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights and the bias of the computation, in the network's numbers."""
        if self.highest is None:
            weight = self.float_weight()
        else:
            unit = by_output(self.unit, self.weight)
            step = WEIGHT_UNITS / self.highest
            weight = RoundWeight.apply(self.weight, step, self.highest, unit)
        bias = self.first_bias + self.bias_unit * self.bias
        return self.in_format(weight), self.in_format(bias)

    def in_format(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, rounded to FP16 if this layer is `half`."""
        return RoundHalf.apply(x) if self.half else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.in_format(self.compute(self.in_format(x), *self.used()))


def fake_quantized(quantized: Quantized, images: torch.Tensor) -> fx.GraphModule:
    """Return a network that learns with the rounding of `quantized`, whose biases are float.

    `images`, float32 (n, 3, 224, 224) normalised, give the spread of each layer's output. Modules
    that stay in FP32 do not learn. Weights start from FP32, with the scales of `quantized`.
    """
    config = quantized.config
    moments = channel_moments(quantized.fp32, images.split(calibration.BATCH))
    network = frozen(quantized.fp32)
    qdqs = insertion.insert(network, config, quantized.keep_fp32, FakeQuantize)
    for name in qdqs.source:
        qdq = quantized.qdq(name)
        in_the_middle = config.centred and qdq.zero_point.eq(config.middle).all()
        stays = config.symmetric or in_the_middle
        learns = name not in qdqs.gates
        network.get_submodule(name).assign(qdq.scale, qdq.zero_point, learns, stays)
    for name, leading in qdqs.same_as.items():
        network.set_submodule(name, network.get_submodule(leading))
    for name, layer in quantized.layers.items():
        plain = network.get_submodule(name)
        trained = FakeQuantizedLayer(plain, layer.scale, layer.high, moments[name][1])
        trained.first_bias.copy_(layer.bias)
        network.set_submodule(name, trained)
    return network


def frozen(network: fx.GraphModule) -> fx.GraphModule:
    """Copy `network` without learning parameters and without operators that work in place."""
    network = copy.deepcopy(network).requires_grad_(False).train()
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    for node in network.graph.nodes:
        if node.target is operator.iadd:
            node.target = operator.add
    network.recompile()
    return network


@torch.no_grad()
def to_integers(
    network: fx.GraphModule, keep_fp32: tuple[str, ...], config: QDQConfig
) -> Quantized:
    """Convert a fake-quantized `network`, made for `config.in_training`, for `config`."""
    result = Quantized.skeleton(without_rounding(network), config, keep_fp32)
    shift = INTEGERS[config.activation][0] - INTEGERS[config.in_training.activation][0]
    for name in result.qdqs.source:
        trained = network.get_submodule(name)
        zero_point = trained.zero_point.round().clamp(*trained.limits).long()
        result.qdq(name).assign(trained.scale, zero_point + shift)
    for name, layer in result.layers.items():
        scale = network.get_submodule(name).unit * (WEIGHT_UNITS / layer.high)
        layer.quantize(result.fp32.get_submodule(name), result.input_scale(name), scale)
    return result


def without_rounding(network: fx.GraphModule) -> fx.GraphModule:
    """Copy a fake-quantized `network` as a float network with the learned weights and biases."""
    network = copy.deepcopy(network).eval()
    modules = dict(network.named_modules(remove_duplicate=False))
    for node in list(network.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], FakeQuantize):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    for name, module in modules.items():
        if isinstance(module, FakeQuantize):
            network.delete_submodule(name)
        elif isinstance(module, FakeQuantizedLayer):
            network.set_submodule(name, module.plain(module.float_weight(), module.used()[1]))
    network.graph.lint()
    network.recompile()
    return network.requires_grad_(False)


def fake_quantized_layers(network: nn.Module) -> dict[str, FakeQuantizedLayer]:
    """Return the fake-quantized layers of a network by name."""
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, FakeQuantizedLayer)}
