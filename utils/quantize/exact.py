"""Exact execution of a quantized network: the method's logits, before any engine's error.

Integers are carried in float64, which holds every product and sum of this arithmetic without
rounding: a sum of 10,000 products of 16 bits has 46 bits, and float64 has 53. FP32 sums are used
where they are also exact, because they take less time. A layer's scales are multiplied once, after
its sum. Operators between Q/DQ pairs, which engines compute in floating point, are computed in
float64. FP32 would not do: a sum near a rounding boundary falls to the other side, and later layers
amplify the difference. On ResNet-18, the same network in FP32 is only 38 to 44 dB away.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import fx, nn

from utils import progress
from utils.quantize.layers import WEIGHTED
from utils.quantize.modules import QDQ, QuantizedLayer, along_channels
from utils.quantize.network import Quantized


class ExactInterpreter(fx.Interpreter):
    """An interpreter that runs the network of a `Quantized` in exact arithmetic.

    `watch(name, output)` is called with the output of every convolution and linear layer.
    """

    def __init__(
        self,
        quantized: Quantized,
        watch: Callable[[str, torch.Tensor], None] = lambda name, output: None,
    ):
        super().__init__(quantized.network, garbage_collect_values=True)
        self.quantized, self.watch = quantized, watch

    def call_module(self, target, args, kwargs):
        module, x = self.fetch_attr(target), args[0]
        if isinstance(module, QDQ):
            return round_to(module, x)
        if isinstance(module, QuantizedLayer):
            output = layer_output(module, x, self.quantized.input_scale(target))
        elif isinstance(module, WEIGHTED):
            output = float_layer(module, x)
        elif isinstance(module, nn.BatchNorm2d):  # not folded: there is no convolution before it
            return copy.deepcopy(module).double()(x)
        else:
            return module(*args, **kwargs)
        self.watch(target, output)
        return output


def round_to(qdq: QDQ, x: torch.Tensor) -> torch.Tensor:
    """Round `x` to the values of a Q/DQ pair, float64."""
    scale, zero_point = along_channels(qdq.scale.double(), x), along_channels(qdq.zero_point, x)
    integers = (x / scale).round_().add_(zero_point).clamp_(*qdq.limits)
    return integers.sub_(zero_point).mul_(scale)


def layer_output(layer: QuantizedLayer, x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """Return the output of `layer`, float64, on multiples `x` of `input_scale`."""
    # Multiples of a float32 are exact in float64, so the division gives back the integers.
    integers = (x / along_channels(input_scale.double(), x)).round_()
    sums = exact_sums(layer, integers)
    # Only depthwise layers read one scale per channel. Their outputs are these channels.
    scale = along_channels(input_scale.double() * layer.scale.double(), sums)
    if layer.bias_integers is None:
        return sums.mul_(scale).add_(along_channels(layer.bias.double(), sums))
    return sums.add_(along_channels(layer.bias_integers, sums)).mul_(scale)


def exact_sums(layer: QuantizedLayer, integers: torch.Tensor) -> torch.Tensor:
    """Return the sums of products of `integers` and the layer's weights, exact, as float64.

    FP32 holds all integers up to 2^24. If a sum of products may be larger, the integers are split
    into multiples of 16 and remainders, whose sums are smaller. This makes FP32 convolutions of
    8-bit integers exact in all of the study's layers, at two to four times the speed of float64.
    """
    largest = integers.abs().max().item()
    # The largest sum if all integers were 1.
    reach = layer.weight.double().abs().flatten(1).sum(1).max().item()
    if largest * reach < 2**24:
        return layer.compute(integers.float(), layer.weight.float(), None).double()
    if max(16.0, largest / 16 + 1) * reach < 2**24:
        integers, weight = integers.float(), layer.weight.float()
        multiples = torch.floor(integers / 16)
        remainders = integers - 16 * multiples
        sums = layer.compute(multiples, weight, None).double().mul_(16)
        return sums.add_(layer.compute(remainders, weight, None))
    return layer.compute(integers, layer.weight.double(), None)


def float_layer(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a layer that stays in FP32, computed in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, layer.weight.double(), bias)
    return nn.functional.conv2d(
        x, layer.weight.double(), bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


@torch.no_grad()
def execute(quantized: Quantized, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of `images`, float32 (n, 3, 224, 224) normalised, as float64 (n, 2)."""
    return ExactInterpreter(quantized).run(images.double())


def logits(quantized: Quantized, split, batch_size: int = 16) -> np.ndarray:
    """Return the exact logits of a split of images in its order, float32 (n, 2)."""
    rows = []
    with progress.Bar("exact execution", len(split), "images") as bar:
        for x, _ in split.batches(batch_size):
            rows.append(execute(quantized, x).float().numpy())
            bar.step(len(x))
    return np.concatenate(rows)
