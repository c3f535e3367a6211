"""AdaRound: round each weight up or down, whichever preserves the output of its layer.

Rounding to the nearest integer is not optimal: errors of different weights can cancel, depending on
the inputs of the layer. This choice is called AdaRound: Nagel et al. 2020, "Up or Down? Adaptive
Rounding for Post-Training Quantization" (arXiv:2004.10568). Layers are visited in the order of
computation. Each reads the outputs of the quantized layers before it, and its target is the output
of the float layer in the float network (section 3.3).

The paper relaxes the choice and follows gradients. The squared error is quadratic in the weights,
so the gain of a single change is known exactly: here one weight after another takes its other
neighbour if that lowers the error, until none does. This is coordinate descent, as in COMQ
(Zhang et al. 2024, arXiv:2403.07134). It has no step size and takes seconds.
"""

import torch
import torch.nn.functional as F

from utils import progress
from utils.quantize import calibration
from utils.quantize.exact import ExactInterpreter
from utils.quantize.layers import watching, weighted
from utils.quantize.modules import QuantizedLayer, by_output
from utils.quantize.network import Quantized

SAMPLES = 8192  # outputs per channel that judge its weights
SWEEPS = 20  # at most, over all weights of a layer
COLUMNS = 128  # weights of a channel between two updates of all gradients


def adapt(quantized: Quantized, images: torch.Tensor) -> None:
    """Choose the integers of all weights again, in place, on `images` (n, 3, 224, 224).

    Scales and biases stay. On the samples, no output channel has a larger squared error than with
    rounding to the nearest.
    """
    count = max(1, SAMPLES // len(images))  # positions per image
    wanted: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        wanted.setdefault(name, []).append(outputs_at(output, count))

    layers = weighted(quantized.fp32).items()
    with watching([item for item in layers if item[0] in quantized.layers], keep):
        calibration.observe(quantized.fp32, images)
    targets = {name: torch.cat(batches) for name, batches in wanted.items()}
    with progress.Bar("rounding", len(targets), "layers") as bar, torch.no_grad():
        _Adapting(quantized, targets, bar).run(images.double())


class _Adapting(ExactInterpreter):
    """An exact run that chooses the integers of each layer before it computes."""

    def __init__(self, quantized: Quantized, targets: dict[str, torch.Tensor], bar: progress.Bar):
        super().__init__(quantized)
        self.targets, self.bar = targets, bar

    def call_module(self, target, args, kwargs):
        layer = self.fetch_attr(target)
        if isinstance(layer, QuantizedLayer):
            outputs = self.targets.pop(target)
            inputs = inputs_at(layer, args[0], len(outputs) // len(args[0]))
            adapt_layer(layer, self.quantized.fp32.get_submodule(target).weight, inputs, outputs)
            self.bar.step(note=target)
        return super().call_module(target, args, kwargs)


def positions(count: int, available: int) -> torch.Tensor:
    """Return `count` different positions of `available`, int64: random, but always the same."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(0))[:count]


def outputs_at(output: torch.Tensor, count: int) -> torch.Tensor:
    """Sample an output (n, channels, ...) at `count` positions per image.

    Returns float32 (n x positions, channels).
    """
    flat = output.flatten(2) if output.ndim > 2 else output[..., None]
    return flat[:, :, positions(count, flat.shape[2])].transpose(1, 2).flatten(0, 1).float()


def inputs_at(layer: QuantizedLayer, x: torch.Tensor, count: int) -> torch.Tensor:
    """Return the inputs that `outputs_at` of a layer depend on, (n x positions, groups, inputs)."""
    if layer.convolution is None:
        return x[:, None].float()
    stride, padding, dilation, groups = layer.convolution
    kernel, size = layer.weight.shape[2:], x.shape[2:]
    height, width = (
        (size[dim] + 2 * padding[dim] - dilation[dim] * (kernel[dim] - 1) - 1) // stride[dim] + 1
        for dim in (0, 1)
    )
    where = positions(count, height * width)
    starts = where // width, where % width
    rows, columns = (
        starts[dim][:, None] * stride[dim] + torch.arange(kernel[dim]) * dilation[dim]
        for dim in (0, 1)
    )
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    # (n, channels, positions, kernel height, kernel width)
    windows = padded[:, :, rows[:, :, None], columns[:, None, :]]
    return windows.transpose(1, 2).flatten(0, 1).unflatten(1, (groups, -1)).flatten(2).float()


@torch.no_grad()
def adapt_layer(
    layer: QuantizedLayer, weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor
) -> None:
    """Choose the integers of `layer` in place, all of them neighbours of the float `weight`.

    `weight` is (out, ...). The outputs on `inputs`, float32 (samples, groups, inputs), should come
    close to `outputs` (samples, out).
    """
    groups, size = inputs.shape[1:]

    def by_group(values: torch.Tensor) -> torch.Tensor:
        """Reshape (out, ...) to (groups, out of a group, inputs)."""
        return values.reshape(groups, -1, size)

    scale = by_output(layer.scale, weight)
    exact, step = by_group(weight / scale), by_group(scale.expand_as(weight))
    inputs = inputs.transpose(0, 1)  # (groups, samples, inputs)
    # (groups, samples, out of a group)
    wanted = (outputs - layer.bias).unflatten(1, (groups, -1)).transpose(0, 1)
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
    """Return weights, all taken from `first` or `other`, that no single exchange improves.

    For each output, the error of weights w (groups, out, inputs) is w squares w - 2 w wanted, with
    `squares` (groups, inputs, inputs) and `wanted` (groups, out, inputs).
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
            # Slopes inside the block are up to date; the others follow at once.
            moved = 2 * (weights[..., block] - before) @ squares[:, block]
            moved[..., block] = 0
            slope += moved
        if not exchanged:
            break
    return weights
