"""Equalization: give the channels that a depthwise convolution reads equal ranges.

With one scale for a tensor, a channel gets few steps if another channel is much wider. In the stem
of MobileNetV3-Small, one of 16 channels reaches 255 where the median channel reaches 6. Rounding
that tensor alone to 8 bits brings the network down to chance. A depthwise convolution multiplies
each channel by separate weights, so the layer before it may divide a channel by a factor that these
weights multiply by. In both layers, the scale of the channel's weights takes the factor: their
integers and the network stay the same.

Through ReLU this is exact, because relu(x / s) = relu(x) / s. It is the cross-layer equalization of
Nagel et al. 2019 (arXiv:1906.04721, section 4.1), with factors from the ranges of activations.
Hardswish does not commute with a factor. It is replaced by `ScaledHardswish`, which multiplies its
input by one factor per channel and its output by another. That costs time in every engine, so it is
done only where a single scale costs more than LIMIT.

Engines that can read one scale per channel need no `ScaledHardswish`. One scale per channel also
costs time, so they read it only where no factor replaces it: after hardswish. In MobileNetV3-Small
these are 9 of 11 places, which makes the network 1.035 to 1.065 times as fast in OpenVINO, and no
farther from FP32.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from utils import metrics
from utils.quantize import calibration
from utils.quantize.calibration import Observer
from utils.quantize.layers import watching
from utils.quantize.modules import QDQ, by_output
from utils.quantize.operators import Graph, Kind, ScaledHardswish
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

LIMIT = 30.0  # dB: SQNR of the logits if a single tensor is rounded with one scale
IMAGES = 64  # for this measurement
LOW = 0.5  # largest magnitude of an equalized range's low end, relative to its high end
# Smallest factor, relative to the largest: rare values of quiet channels must also fit.
SMALLEST = 2.0**-8

Range = tuple[torch.Tensor, torch.Tensor]  # low and high ends, float32 (channels,) each


@dataclass(frozen=True)
class Place:
    """A depthwise convolution that is the only reader of another layer."""

    layer: str  # the other layer
    activation: str | None  # ReLU or hardswish between the two
    depthwise: str
    exact: bool  # whether a factor passes between them: through ReLU or nothing

    @property
    def read(self) -> str:
        """The module whose output the depthwise convolution reads."""
        return self.activation or self.layer


def places(network: fx.GraphModule, keep_fp32: tuple[str, ...]) -> list[Place]:
    """Return where a folded `network` can be equalized, in order of computation.

    Modules in `keep_fp32` are left out.
    """
    graph, result = Graph(network), []
    for node in graph.nodes:
        if not graph.depthwise(node):
            continue
        between = graph.module(node.args[0])
        activation = node.args[0] if isinstance(between, nn.ReLU | nn.Hardswish) else None
        layer = node.args[0] if activation is None else activation.args[0]
        if graph.kinds[layer] is not Kind.LAYER or len(layer.users) > 1:
            continue
        if activation is not None and len(activation.users) > 1:
            continue
        if not (graph.inside(layer, keep_fp32) or graph.inside(node, keep_fp32)):
            exact = not isinstance(between, nn.Hardswish)
            result.append(Place(layer.target, activation and activation.target, node.target, exact))
    return result


@torch.no_grad()
def equalize(
    network: fx.GraphModule, images: torch.Tensor, config: QDQConfig, recipe: Int8
) -> frozenset[str]:
    """Equalize a float `network`, whose BatchNorm is folded, in place.

    It stays the same function, except for FP32's rounding. Ranges are taken over `images`, float32
    (n, 3, 224, 224) normalised, by the method of the recipe. If the scales of `config` are "apart",
    nothing is done. If they are per channel where "needed", nothing is done after hardswish.
    Returns the depthwise convolutions for whose inputs one scale is enough.
    """
    if config.scales not in ("tensor", "needed"):
        return frozenset()
    chosen = places(network, recipe.keep_fp32)
    if config.scales == "needed":
        chosen = [place for place in chosen if place.exact]
    names = {name for place in chosen for name in (place.layer, place.read)}
    ranges = channel_ranges(network, names, images, config, recipe.ranges)
    logits = None
    if not all(place.exact for place in chosen):
        logits = network(images[:IMAGES]).numpy()
    for place in chosen:
        layer, factor = network.get_submodule(place.layer), factors(ranges[place.read])
        if place.exact:
            divide(layer, factor)
        else:
            rounded = {place.read} if config.position == "inputs" else {place.layer, place.read}
            ends = {name: ranges[name] for name in rounded}
            if one_scale_sqnr_db(network, ends, config, images[:IMAGES], logits) >= LIMIT:
                continue
            before = factors(ranges[place.layer])
            if place.layer not in rounded:
                before = torch.ones_like(factor)
            divide(layer, before)
            network.set_submodule(place.read, ScaledHardswish(before, 1 / factor))
        multiply(network.get_submodule(place.depthwise), factor)
    return frozenset(place.depthwise for place in chosen)


def one_scale_sqnr_db(
    network: fx.GraphModule,
    ends: dict[str, Range],
    config: QDQConfig,
    images: torch.Tensor,
    logits: np.ndarray,
) -> float:
    """Return the lowest SQNR of the logits (dB) if one tensor alone is rounded with one scale.

    `ends` has the channel ranges of these tensors, by module. `logits` are of the float network.
    """
    worst = math.inf
    for name, channels in ends.items():
        rounded = _rounded_alone(network, name, channels, config).run(images).numpy()
        sqnr = metrics.sqnr_db(logits, rounded)
        if sqnr is not None:
            worst = min(worst, sqnr)
    return worst


def channel_ranges(
    network: fx.GraphModule, names: set[str], images: torch.Tensor, config: QDQConfig, method: str
) -> dict[str, Range]:
    """Return the channel ranges of the outputs of the modules `names`.

    `method` is a key of `calibration.RANGES`.
    """
    graph, observers = Graph(network), {}
    for node in graph.nodes:
        if node.target in names:
            observer = observers[node.target] = Observer()
            observer.channelwise, observer.useful = True, graph.useful(graph.readers(node.users))
    modules = [(name, network.get_submodule(name)) for name in observers]
    with watching(modules, lambda name, output: observers[name](output)):
        calibration.fill(network, observers, images, method)
    ranges = {}
    for name, observer in observers.items():
        low, high = observer.range(method, config)
        ranges[name] = torch.from_numpy(low).float(), torch.from_numpy(high).float()
    return ranges


def factors(ends: Range) -> torch.Tensor:
    """Return factors, float32 (channels,): channels divided by them have equal ranges.

    The largest factor is 1. Afterwards, low ends are at most LOW times the high end: otherwise, a
    channel of negative numbers would double the range of all channels.
    """
    low, high = ends
    reach = torch.maximum(high, -low / LOW)
    return (reach / reach.max()).clamp_min(SMALLEST)


def divide(layer: nn.Module, factor: torch.Tensor) -> None:
    """Divide the output channels of a convolution or linear layer by `factor` (out,), in place."""
    layer.weight.data /= by_output(factor, layer.weight)
    if layer.bias is not None:
        layer.bias.data /= factor


def multiply(depthwise: nn.Conv2d, factor: torch.Tensor) -> None:
    """Multiply the weights of a depthwise convolution by `factor` (channels,), in place."""
    depthwise.weight.data *= by_output(factor, depthwise.weight)


def _rounded_alone(
    network: fx.GraphModule, name: str, ends: Range, config: QDQConfig
) -> fx.Interpreter:
    """Return an interpreter of `network` that rounds the output of module `name` with one scale."""
    qdq = QDQ(config.activation, config.limits)
    low, high = ends[0].min()[None].double().numpy(), ends[1].max()[None].double().numpy()
    qdq.assign(*calibration.numbers(low, high, config))
    return _Alone(network, name, qdq)


class _Alone(fx.Interpreter):
    """An interpreter that rounds the output of one module and nothing else."""

    def __init__(self, network: fx.GraphModule, name: str, qdq: QDQ):
        super().__init__(network)
        self.name, self.qdq = name, qdq

    def call_module(self, target, args, kwargs):
        output = super().call_module(target, args, kwargs)
        return self.qdq(output) if target == self.name else output
