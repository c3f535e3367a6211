"""Training in the units of QAT, but without integers: the control of QAT, and QAT to FP16."""

import copy

import torch
from torch import fx, nn

from utils.quantize import calibration
from utils.quantize.fake_quant import (
    WEIGHT_UNITS,
    FakeQuantizedLayer,
    fake_quantized_layers,
    frozen,
)
from utils.quantize.layers import channel_moments, weighted
from utils.quantize.modules import quantize_weight
from utils.quantize.operators import Graph, folded


def floating(model: nn.Module, images: torch.Tensor, half: bool = False) -> fx.GraphModule:
    """Return the folded network of `model`, ready to learn in the units of QAT without integers.

    In FP32, it is the control of QAT. If `half` is set, weights and biases are rounded to FP16, and
    so are the inputs and outputs of layers. `images`, float32 (n, 3, 224, 224) normalised, give the
    spread of outputs.
    """
    network = frozen(folded(model))
    moments = channel_moments(network, images.split(calibration.BATCH))
    for name, layer in weighted(network).items():
        scale = quantize_weight(layer.weight, WEIGHT_UNITS)[1]
        trained = FakeQuantizedLayer(layer, scale, None, moments[name][1])
        trained.half = half
        network.set_submodule(name, trained)
    return network


@torch.no_grad()
def plain(trained: fx.GraphModule, model: nn.Module) -> nn.Module:
    """Return a copy of `model` with the learned weights of `trained`, which `floating` made.

    Weights include the factors of their BatchNorm, which then only adds the bias.
    """
    result = copy.deepcopy(model)
    graph = Graph(fx.symbolic_trace(copy.deepcopy(model).eval()))
    learned = fake_quantized_layers(trained)
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
