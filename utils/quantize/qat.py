"""Quantization-aware training: a network that rounds as the deployed one will, and its conversion.

Gradients pass the rounding as if it were not there, and are zero where values are clipped: the
straight-through estimator of Bengio et al. 2013 (arXiv:1308.3432).
"""

import copy

import torch
import torch.nn.functional as F
from torch import fx, nn

from utils.quantize import calibration
from utils.quantize import placement as placing
from utils.quantize.operators import folded
from utils.quantize.placement import INTEGERS, Placement
from utils.quantize.quantized import Quantized, by_output, quantize_weight

SETTINGS = ("bits", "activations", "headroom", "keep_fp32", "calibration_images")  # of a recipe, that decide what is trained


class TrainedPair(nn.Module):
    """The rounding of a `Pair`, with gradients; its scale and zero-point stay as calibrated."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.limits = INTEGERS[dtype]
        self.assign(torch.tensor(1.0), torch.tensor(0))

    def assign(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Set the scale, float32 () or (channels,), and the zero-point of the same shape."""
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point.to(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale.ndim == 0:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.limits)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 1, *self.limits)


class _Rounded:
    """A layer that trains FP32 weights and computes with their rounded values."""

    highest_weight = 127

    def rounded(self) -> torch.Tensor:
        """Return the values of the integers of the weights, with straight-through gradients."""
        integers, scale = quantize_weight(self.weight, self.highest_weight)
        return self.weight + (integers * by_output(scale, self.weight) - self.weight).detach()


class RoundedConv2d(_Rounded, nn.Conv2d):
    """A convolution that trains FP32 weights and computes with their rounded values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.rounded(), self.bias)


class RoundedLinear(_Rounded, nn.Linear):
    """A linear layer that trains FP32 weights and computes with their rounded values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.rounded(), self.bias)


def trainable(model: nn.Module, images: torch.Tensor, recipe: dict, placement: Placement) -> fx.GraphModule:
    """Return a trainable graph of `model` that rounds weights and activations.

    Parameters keep their names. BatchNorm is not folded, so that it trains as in the control. The
    integers are the same as with folding, which multiplies a channel's weights by one number: the
    channel's scale absorbs it. Activations have the ranges of PTQ, calibrated on `images`
    (n, 3, 224, 224); biases are not rounded. Recipe: see `ptq.quantize`, but nothing is equalized.
    """
    network = fx.symbolic_trace(copy.deepcopy(model).cpu().train())
    pairs = placing.insert(network, placement, tuple(recipe.get("keep_fp32", ())), lambda: TrainedPair(placement.activation))
    for name, numbers in calibration.calibrate(folded(model), images, placement, recipe).items():
        network.get_submodule(name).assign(*numbers)
    for name in pairs.reads:
        layer = network.get_submodule(name)  # the same parameters, another forward()
        layer.__class__ = RoundedConv2d if isinstance(layer, nn.Conv2d) else RoundedLinear
        layer.highest_weight = placement.highest_weight
    return network


def convert(trained: nn.Module, model: nn.Module, recipe: dict, placement: Placement) -> Quantized:
    """Return the quantized network for `placement`, trained with `placement.in_training`.

    `trained` is the network that `trainable` returned for `model`.
    """
    weights = trained.state_dict()
    model = copy.deepcopy(model)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    network = folded(model)
    result = Quantized.skeleton(network, placement, tuple(recipe.get("keep_fp32", ())))
    result.reference = network
    shift = INTEGERS[placement.activation][0] - INTEGERS[placement.in_training.activation][0]
    for name in result.pairs.source:
        pair = trained.get_submodule(name)
        result.pair(name).assign(pair.scale, pair.zero_point + shift)
        result.origin[name] = calibration.origin(result.pairs, name, recipe, recipe["calibration_images"]) + ", kept in training"
    for name, layer in result.layers.items():
        layer.quantize(result.reference.get_submodule(name), result.input_scale(name))
        result.origin[name] = "trained; largest magnitude of each channel"
    return result
