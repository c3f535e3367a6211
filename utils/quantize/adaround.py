"""Adaptive rounding: round each weight up or down, whichever keeps the output of its layer.

Rounding to the nearest is not best: what one weight adds to an output another can take away. Which
weights make up for one another depends on the inputs that a layer sees. The choice is that of
AdaRound: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"
(arXiv:2004.10568). Layers are visited in the order of computation. Each reads what the quantized
layers before it give, and is to answer as the float layer does in the float network (section 3.3).

AdaRound relaxes the choice and descends along gradients. The squared error is quadratic in the
weights, so it is as easy to know what a single change gains: here one weight after the other takes
its other neighbour if that lowers the error, until none does. That is coordinate descent, as in
COMQ (Zhang et al. 2024, arXiv:2403.07134); it has no step size, and takes seconds.
"""

import torch
import torch.nn.functional as F

from utils import progress
from utils.quantize import calibration
from utils.quantize.exact import ExactInterpreter
from utils.quantize.layers import watching, weighted
from utils.quantize.modules import QuantizedLayer, by_output
from utils.quantize.network import Quantized

SAMPLES = 8192  # outputs of each channel that its weights are judged by
SWEEPS = 20  # over all weights of a layer, at most
COLUMNS = 128  # weights of a channel between two updates of all gradients


def adapt(quantized: Quantized, images: torch.Tensor) -> None:
    """Choose the integers of all quantized weights again, in place, on `images` (n, 3, 224, 224).

    Scales and biases remain. No output channel has a larger squared error on the samples than by
    rounding to the nearest.
    """
    each = max(1, SAMPLES // len(images))
    wanted: dict[str, list[torch.Tensor]] = {}
    modules = [item for item in weighted(quantized.fp32).items() if item[0] in quantized.layers]
    with watching(
        modules, lambda name, output: wanted.setdefault(name, []).append(outputs_at(output, each))
    ):
        calibration.observe(quantized.fp32, images)
    with progress.Bar("rounding", len(wanted), "layers") as bar, torch.no_grad():
        _Adapting(quantized, {name: torch.cat(parts) for name, parts in wanted.items()}, bar).run(
            images.double()
        )


class _Adapting(ExactInterpreter):
    """An exact run that chooses the integers of each layer before it computes."""

    def __init__(self, quantized: Quantized, wanted: dict[str, torch.Tensor], bar: progress.Bar):
        super().__init__(quantized)
        self.wanted, self.bar = wanted, bar

    def call_module(self, target, args, kwargs):
        layer = self.fetch_attr(target)
        if isinstance(layer, QuantizedLayer):
            outputs = self.wanted.pop(target)
            inputs = inputs_at(layer, args[0], len(outputs) // len(args[0]))
            adapt_layer(layer, self.quantized.fp32.get_submodule(target).weight, inputs, outputs)
            self.bar.step(note=target)
        return super().call_module(target, args, kwargs)


def positions(count: int, all_of_them: int) -> torch.Tensor:
    """Return `count` different positions of `all_of_them`, at random but always the same, int64."""
    return torch.randperm(all_of_them, generator=torch.Generator().manual_seed(0))[:count]


def outputs_at(output: torch.Tensor, count: int) -> torch.Tensor:
    """Return an output (n, channels, ...) at `count` positions an image, (n x positions, channels)."""
    flat = output.flatten(2) if output.ndim > 2 else output[..., None]
    return flat[:, :, positions(count, flat.shape[2])].transpose(1, 2).flatten(0, 1).float()


def inputs_at(layer: QuantizedLayer, x: torch.Tensor, count: int) -> torch.Tensor:
    """Return what the `outputs_at` of a layer are computed from, (n x positions, groups, inputs)."""
    if layer.convolution is None:
        return x[:, None].float()
    stride, padding, dilation, groups = layer.convolution
    kernel, size = layer.weight.shape[2:], x.shape[2:]
    shape = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    where = positions(count, shape[0] * shape[1])
    starts = where // shape[1], where % shape[1]
    rows, columns = (
        starts[i][:, None] * stride[i] + torch.arange(kernel[i]) * dilation[i] for i in (0, 1)
    )
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = padded[
        :, :, rows[:, :, None], columns[:, None, :]
    ]  # (n, channels, positions, kernel height, width)
    return windows.transpose(1, 2).flatten(0, 1).unflatten(1, (groups, -1)).flatten(2).float()


@torch.no_grad()
def adapt_layer(
    layer: QuantizedLayer, weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor
) -> None:
    """Choose the integers of `layer` in place, each a neighbour of the float `weight` (out, ...).

    Its outputs on `inputs`, float32 (samples, groups, inputs), are to be near `outputs` (samples, out).
    """
    groups, size = inputs.shape[1:]

    def by_group(
        values: torch.Tensor,
    ) -> torch.Tensor:  # (out, ...) -> (groups, out of a group, inputs)
        return values.reshape(groups, -1, size)

    scale = by_output(layer.scale, weight)
    exact, step = by_group(weight / scale), by_group(scale.expand_as(weight))
    inputs = inputs.transpose(0, 1)  # (groups, samples, inputs)
    wanted = (
        (outputs - layer.bias).unflatten(1, (groups, -1)).transpose(0, 1)
    )  # (groups, samples, out of a group)
    nearest = exact.round().clamp(layer.low, layer.high)
    other = torch.where(nearest > exact, nearest - 1, nearest + 1).clamp(layer.low, layer.high)
    products = inputs.transpose(1, 2) @ inputs, wanted.transpose(1, 2) @ inputs
    chosen = descend(nearest * step, other * step, *products) / step
    errors = [
        (inputs @ (values * step).transpose(1, 2) - wanted).square().mean(1)
        for values in (chosen, nearest)
    ]
    best = torch.where((errors[0] < errors[1])[..., None], chosen.round(), nearest)
    layer.weight = best.reshape(weight.shape).to(layer.weight.dtype)


def descend(
    first: torch.Tensor, other: torch.Tensor, squares: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return the weights, each from `first` or `other`, that no single exchange improves.

    The error of weights w (groups, out, inputs) is w squares w - 2 w wanted, for each of the outputs,
    with `squares` (groups, inputs, inputs) and `wanted` (groups, out, inputs).
    """
    weights, other = first.clone(), other.clone()
    for _ in range(SWEEPS):
        slope, exchanged = 2 * (weights @ squares - wanted), 0
        for start in range(0, weights.shape[2], COLUMNS):
            block = slice(start, start + COLUMNS)
            before, local = weights[..., block].clone(), squares[:, block, block]
            for column in range(before.shape[2]):
                here = start + column
                change = other[..., here] - weights[..., here]
                gain = change * slope[..., here] + change.square() * squares[:, here, here, None]
                change = torch.where(gain < 0, change, 0.0)
                weights[..., here] += change
                other[..., here] -= change
                slope[..., block] += 2 * change[..., None] * local[:, None, column]
                exchanged += int((gain < 0).sum())
            # Slopes inside the block are up to date; all others follow at once.
            moved = 2 * (weights[..., block] - before) @ squares[:, block]
            moved[..., block] = 0
            slope += moved
        if not exchanged:
            break
    return weights
