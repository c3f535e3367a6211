"""Quantization-aware training: the network that PTQ gives, trained on with its rounding.

Training starts where PTQ by the same recipe ends: BatchNorm is folded, inputs of depthwise layers are
equalized, and so on. Then weights, biases and the ranges of activations learn. Gradients pass the
rounding as if it were not there, and are zero where values are clipped: the straight-through
estimator of Bengio et al. 2013 (arXiv:1308.3432). Ranges learn at both ends, as in LSQ+ (Bhalgat
et al. 2020, arXiv:2004.09576).

Each parameter learns in units that suit its size: a weight in 1/127 of the largest of its channel, a
bias in WIDTH of the spread of its channel's output, the ends of a range in WIDTH of that range. So one
learning rate fits all channels, layers, networks and bit widths. In plain units it would not: after
folding and equalization, the channels of a layer differ by factors of hundreds, and a step that hardly
changes one channel moves the weights of another by several integers.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from utils.quantize import calibration, insertion, ptq
from utils.quantize.layers import channel_moments, weighted
from utils.quantize.modules import along_channels, by_output, quantize_weight
from utils.quantize.network import Quantized
from utils.quantize.operators import Graph, folded
from utils.quantize.qdq_config import INTEGERS, QDQConfig

# Of a recipe: what decides the network that is trained.
SETTINGS = (
    "bits",
    "activations",
    "headroom",
    "keep_fp32",
    "calibration_images",
    "equalize",
    "bias_correction",
    "reconstruct",
)
STEPS = 127  # units of a weight: from 0 to the largest of its channel
WIDTH = 1 / 16  # unit of biases and ranges


class Rounding(torch.autograd.Function):
    """Round to the nearest of the values of a pair, with gradients for its scale and zero-point.

    With x, its rounded value y and their gradients dx (0 where x is clipped) and dy, those of the
    scale s and of the zero-point z are sum(dy y - dx x) / s and s sum(dx - dy). These are the
    formulas of LSQ+, in which y - x is the error of rounding and y the clipped end.

    A few vectorised operators are faster on CPUs than one of torch's `fake_quantize` operators, which
    are not vectorised: 6 against 33 ms for 6.4 million values on 2 threads.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, limits):
        x = x.float()  # mixed precision gives BF16 or FP16, which would round to other integers
        each = along_channels(scale, x)
        integer = along_channels(zero_point.round().clamp(*limits), x)
        y = (x / each).round_().add_(integer).clamp_(*limits).sub_(integer).mul_(each)
        ctx.save_for_backward(x, y, each, integer)
        ctx.limits = limits
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, scale, integer = ctx.saved_tensors
        dx = passed(dy, (x / scale).add_(integer), *ctx.limits)
        dims = [dim for dim in range(x.ndim) if scale.ndim == 0 or dim != 1]
        of_scale = (
            (dy * y).addcmul_(dx, x, value=-1).sum(dims) / scale.flatten()
            if ctx.needs_input_grad[1]
            else None
        )
        of_zero_point = (
            scale.flatten() * (dx.sum(dims) - dy.sum(dims)) if ctx.needs_input_grad[2] else None
        )
        return dx, of_scale, of_zero_point, None


class WeightRounding(torch.autograd.Function):
    """Round weights (out, ...) to integers from -`highest` to `highest`, `step` in the same numbers, times `unit`.

    `unit`, which broadcasts over the weights, is not learned.
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
        return passed(dy, weight / step, -highest, highest).mul_(unit), None, None, None


def passed(gradient: torch.Tensor, numbers: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Return `gradient` where `numbers`, of its shape, are rounded to integers from `low` to `high`, elsewhere 0."""
    return torch.ops.aten.hardtanh_backward(gradient, numbers, low - 0.5, high + 0.5)


class HalfRounding(torch.autograd.Function):
    """Round float32 numbers to the nearest of FP16; gradients pass as if nothing were rounded."""

    @staticmethod
    def forward(ctx, x):
        return x.half().float()

    @staticmethod
    def backward(ctx, dy):
        return dy


class FakeQuantize(nn.Module):
    """The rounding of a `QDQ`, whose range learns at both ends.

    `stretch` and `shift`, float32 () or (channels,), are 0 at the beginning.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.limits = INTEGERS[dtype]
        self.assign(torch.tensor(1.0), torch.tensor(0))

    def assign(
        self,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        learns: bool = True,
        symmetric: bool = False,
    ) -> None:
        """Set the scale and the zero-point, () or (channels,), at which training begins.

        They stay unless the pair `learns`; the zero-point of a `symmetric` one stays in any case.
        """
        self.register_buffer("first_scale", scale.float())
        self.register_buffer("first_zero_point", zero_point.float())
        self.stretch = nn.Parameter(
            torch.zeros_like(scale, dtype=torch.float32), requires_grad=learns
        )
        self.shift = nn.Parameter(
            torch.zeros_like(scale, dtype=torch.float32), requires_grad=learns and not symmetric
        )

    @property
    def scale(self) -> torch.Tensor:
        """The present scale."""
        return self.first_scale * (1 + WIDTH * self.stretch)

    @property
    def zero_point(self) -> torch.Tensor:
        """The present zero-point, float32, not rounded."""
        low, high = self.limits
        return self.first_zero_point + WIDTH * (high - low) * self.shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Rounding.apply(x, self.scale, self.zero_point, self.limits)


class _Trained:
    """A layer whose weights and biases learn in units of their size, and are rounded or not.

    `weight` holds units, `bias` what was learned, in units, besides `first_bias`. With `half`, the
    layer reads, holds and writes numbers of FP16.
    """

    half = False

    def begin(self, scale: torch.Tensor, highest: int | None, spread: torch.Tensor) -> None:
        """Turn a float layer into a trained one, in place.

        `scale` (out,) is the step of a channel's weights, whose integers reach from -`highest` to
        `highest`, or None: they are not rounded. `spread` (out,) is the standard deviation of a
        channel's output.
        """
        bias = torch.zeros(len(self.weight)) if self.bias is None else self.bias.detach().clone()
        self.highest = highest
        self.register_buffer("unit", scale * ((highest or STEPS) / STEPS))
        self.register_buffer("first_bias", bias)
        self.register_buffer("bias_unit", WIDTH * spread)
        self.weight = nn.Parameter(self.weight.detach() / by_output(self.unit, self.weight))
        self.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=self.bias is not None)

    def float_weight(self) -> torch.Tensor:
        """Return the weights before rounding, in the network's numbers."""
        return self.weight * by_output(self.unit, self.weight)

    def used(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights and the bias that the layer computes with, in the network's numbers."""
        if self.highest is None:
            weight = self.float_weight()
        else:
            weight = WeightRounding.apply(
                self.weight, STEPS / self.highest, self.highest, by_output(self.unit, self.weight)
            )
        return self.in_format(weight), self.in_format(self.first_bias + self.bias_unit * self.bias)

    def in_format(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, rounded to FP16 if this layer is `half`."""
        return HalfRounding.apply(x) if self.half else x


class TrainedConv2d(_Trained, nn.Conv2d):
    """A convolution that learns in units and computes with rounded weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.in_format(self._conv_forward(self.in_format(x), *self.used()))


class TrainedLinear(_Trained, nn.Linear):
    """A linear layer that learns in units and computes with rounded weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.in_format(F.linear(self.in_format(x), *self.used()))


def trainable(
    model: nn.Module, images: torch.Tensor, recipe: dict, config: QDQConfig
) -> fx.GraphModule:
    """Return the network that PTQ by `recipe` gives, ready to be trained with its rounding.

    `images`, float32 (n, 3, 224, 224) normalised, are those for calibration; for the recipe see
    `ptq.quantize`. Biases are not rounded. What stays in FP32 does not learn.
    """
    quantized = ptq.quantize(model, images, recipe, config)
    network = _quiet(quantized.fp32)
    network.meta["folded"] = quantized.fp32
    moments = channel_moments(quantized.fp32, images.split(calibration.BATCH))
    qdqs = insertion.insert(
        network, config, quantized.keep_fp32, lambda: FakeQuantize(config.activation)
    )
    for name in qdqs.source:
        qdq = quantized.qdq(name)
        stays = config.symmetric or (config.centred and qdq.zero_point.eq(config.middle).all())
        network.get_submodule(name).assign(qdq.scale, qdq.zero_point, name not in qdqs.gates, stays)
    for name, leading in qdqs.same_as.items():
        network.set_submodule(name, network.get_submodule(leading))
    for name, layer in quantized.layers.items():
        trained = _begin(network.get_submodule(name), layer.scale, layer.high, moments[name][1])
        trained.first_bias.copy_(layer.bias)
    return network


def floating(model: nn.Module, images: torch.Tensor, half: bool = False) -> fx.GraphModule:
    """Return the folded network of `model`, ready to be trained in the same units without integers.

    In FP32 it is the control of QAT. With `half`, weights, biases, and what layers read and write are
    rounded to FP16. `images` are as for `trainable`.
    """
    network = _quiet(folded(model))
    moments = channel_moments(network, images.split(calibration.BATCH))
    for name, layer in weighted(network).items():
        _begin(layer, quantize_weight(layer.weight, STEPS)[1], None, moments[name][1]).half = half
    return network


def _quiet(network: fx.GraphModule) -> fx.GraphModule:
    """Copy `network` with nothing that learns, and no operator that overwrites what gradients need."""
    network = copy.deepcopy(network).requires_grad_(False).train()
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    for node in network.graph.nodes:
        if node.target is operator.iadd:
            node.target = operator.add
    network.recompile()
    return network


def _begin(
    layer: nn.Module, scale: torch.Tensor, highest: int | None, width: torch.Tensor
) -> _Trained:
    layer.__class__ = TrainedConv2d if isinstance(layer, nn.Conv2d) else TrainedLinear
    layer.begin(scale, highest, width)
    return layer


@torch.no_grad()
def convert(trained: fx.GraphModule, recipe: dict, config: QDQConfig) -> Quantized:
    """Return the quantized network for `placement` of what `trainable` gave for `placement.in_training`."""
    network = copy.deepcopy(trained.meta["folded"])
    for name, layer in _trained(trained).items():
        plain = network.get_submodule(name)
        plain.weight.data, plain.bias = layer.float_weight(), nn.Parameter(layer.used()[1])
    result = Quantized.skeleton(network, config, tuple(recipe.get("keep_fp32", ())))
    result.fp32 = network
    shift = INTEGERS[config.activation][0] - INTEGERS[config.in_training.activation][0]
    for name in result.qdqs.source:
        qdq = trained.get_submodule(name)
        integer = qdq.zero_point.round().clamp(*qdq.limits).long()
        result.qdq(name).assign(qdq.scale, integer + shift)
        begun = calibration.origin(result.qdqs, name, recipe, recipe["calibration_images"])
        result.origin[name] = begun + (", trained" if qdq.stretch.requires_grad else "")
    for name, layer in result.layers.items():
        scale = trained.get_submodule(name).unit * (STEPS / layer.high)
        layer.quantize(network.get_submodule(name), result.input_scale(name), scale)
        result.origin[name] = "trained; scales as by PTQ"
    return result


@torch.no_grad()
def plain(trained: fx.GraphModule, model: nn.Module) -> nn.Module:
    """Return `model` with the weights that `trained`, from `floating`, has learned.

    Weights hold the factors of their BatchNorm, which then only adds the bias.
    """
    result = copy.deepcopy(model)
    graph, learned = Graph(fx.symbolic_trace(copy.deepcopy(model).eval())), _trained(trained)
    for node in graph.nodes:
        if node.target not in learned:
            continue
        weight, bias = learned[node.target].used()
        layer, after = result.get_submodule(node.target), graph.followed(node)
        layer.weight.copy_(weight)
        if after is not None and isinstance(graph.module(after), nn.BatchNorm2d):
            norm = result.get_submodule(after.target)
            norm.weight.fill_(1)
            norm.bias.copy_(bias if layer.bias is None else bias - layer.bias)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
        elif layer.bias is not None:
            layer.bias.copy_(bias)
    return result


def _trained(network: nn.Module) -> dict[str, _Trained]:
    return {
        name: module for name, module in network.named_modules() if isinstance(module, _Trained)
    }
