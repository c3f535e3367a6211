"""Modules of a quantized network: Q/DQ pairs and layers with integer weights."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.quantize.decomposed_ops import OPS
from utils.quantize.qdq_config import INTEGERS, QDQConfig

SMALLEST_SCALE = 2.0**-20  # of a channel's weights, relative to the layer's largest


class QDQ(nn.Module):
    """Quantization of an activation, followed at once by its dequantization.

    Values are divided by `scale`, rounded to the nearest integer, ties to even, shifted by
    `zero_point` and clipped to `limits`, the lowest and the highest integer: by default, all that
    `dtype` holds. `scale` is float32 and `zero_point` int64, both of shape () or (channels,).
    """

    def __init__(self, dtype: torch.dtype, limits: tuple[int, int] | None = None):
        super().__init__()
        self.dtype, self.limits = dtype, limits or INTEGERS[dtype]
        self.assign(torch.tensor(1.0), torch.tensor(0))

    def assign(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Set the scale and the zero-point."""
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point.long())
        # Exporters need plain numbers: read from a tensor, they would become inputs of the graph.
        self.numbers = (self.scale.item(), self.zero_point.item()) if scale.ndim == 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.numbers:
            how = (*self.numbers, *self.limits, self.dtype)
            return OPS.dequantize_per_tensor.default(OPS.quantize_per_tensor.default(x, *how), *how)
        how = (self.scale, self.zero_point, 1, *self.limits, self.dtype)
        return OPS.dequantize_per_channel.default(OPS.quantize_per_channel.default(x, *how), *how)


class WeightedLayer(nn.Module):
    """The operation of a convolution or linear layer, apart from its numbers.

    `convolution` is (stride, padding, dilation, groups), or None for a linear layer.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.convolution = None
        if isinstance(layer, nn.Conv2d):
            self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the layer's output on `x` with these weights."""
        if self.convolution is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, *self.convolution)

    def plain(self, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        """Return the float layer of torch with these weights, in evaluation mode."""
        out, inputs = weight.shape[:2]
        if self.convolution is None:
            layer = nn.Linear(inputs, out, device="meta")
        else:
            stride, padding, dilation, groups = self.convolution
            how = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
            layer = nn.Conv2d(inputs * groups, out, weight.shape[2:], **how, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        return layer.eval()


class QuantizedLayer(WeightedLayer):
    """A convolution or linear layer with integer weights.

    `weight` holds integers (out, ...), `scale` float32 (out,). `bias` is float32 (out,). With int32
    biases, `bias_integers` holds them, and `bias` their values.
    """

    def __init__(self, layer: nn.Module, config: QDQConfig):
        super().__init__(layer)
        self.high = config.highest_weight(layer)
        self.low = -self.high
        out = len(layer.weight)
        integers = torch.zeros(out, dtype=torch.int32) if config.bias == "int32" else None
        self.register_buffer("weight", torch.zeros_like(layer.weight, dtype=config.weight))
        self.register_buffer("scale", torch.ones(out))
        zeros = torch.zeros(out, dtype=torch.int64)
        self.register_buffer("zero_point", zeros, persistent=False)
        self.register_buffer("bias", torch.zeros(out))
        self.register_buffer("bias_integers", integers)

    def values(self) -> torch.Tensor:
        """Return the values of the integer weights, float32 (out, ...)."""
        scales = (self.scale, self.zero_point)
        ends = (self.low, self.high)
        return OPS.dequantize_per_channel.default(self.weight, *scales, 0, *ends, self.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x, self.values(), self.bias)

    def quantize(
        self, layer: nn.Module, input_scale: torch.Tensor, scale: torch.Tensor | None = None
    ) -> None:
        """Take the integers nearest to the weights and the bias of a float `layer`.

        `input_scale` is the scale of the Q/DQ pair that the layer reads. The scales of the weights
        are `scale` (out,), if given; otherwise `quantize_weight` chooses them.
        """
        out = len(layer.weight)
        bias = torch.zeros(out) if layer.bias is None else layer.bias.detach().float()
        smallest = 0.0
        if self.bias_integers is not None:
            # Nearly dead channels have tiny weights: 2^31 of their steps may not reach the bias.
            smallest = bias.abs() / (input_scale * (INTEGERS[torch.int32][1] - 1))
        integers, self.scale = quantize_weight(layer.weight, self.high, smallest, scale)
        self.weight = integers.to(self.weight.dtype)
        self.set_bias(bias, input_scale)

    def set_bias(self, bias: torch.Tensor, input_scale: torch.Tensor) -> None:
        """Set the bias, float32 (out,), rounded to int32 if the layer has integer biases."""
        if self.bias_integers is None:
            self.bias = bias.float()
            return
        step = input_scale.double() * self.scale.double()
        low, high = INTEGERS[torch.int32]
        integers = torch.clamp(torch.round(bias.double() / step), low, high)
        self.bias_integers = integers.to(torch.int32)
        self.bias = (self.bias_integers.double() * step).float()


def quantize_weight(
    weight: torch.Tensor,
    highest: int,
    smallest: torch.Tensor | float = 0.0,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `weight` (out, ...) symmetrically, with one scale per output channel.

    Returns integers, float32 (out, ...), and scales, float32 (out,). These are `scale`, if given;
    otherwise, the largest magnitude of a channel becomes `highest`. No scale is below `smallest`,
    or below SMALLEST_SCALE times the layer's largest. A channel of zeros has the layer's largest
    scale. A layer of zeros has the scale 1.
    """
    weight = weight.detach()
    scale = weight.abs().flatten(1).amax(1) / highest if scale is None else scale.clone()
    largest = scale.max().item() or 1.0
    scale[scale == 0] = largest
    # XNNPACK refuses channels whose scale is under 2^-32 of the scale of the layer's output.
    # Denormal scales have few digits, and engines read them as 0.
    least = max(SMALLEST_SCALE * largest, torch.finfo(torch.float32).tiny)
    scale = torch.maximum(scale, torch.as_tensor(smallest)).clamp_min(least)
    integers = torch.round(weight / by_output(scale, weight))
    return torch.clamp(integers, -highest, highest), scale


def by_output(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reshape `scale` (out,) so that it broadcasts over `weight` (out, ...)."""
    return scale.view(-1, *[1] * (weight.ndim - 1))


def along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape `values`, () or (channels,), so that they broadcast over `x` (n, channels, ...)."""
    return values if values.ndim == 0 else values.view(1, -1, *[1] * (x.ndim - 2))
