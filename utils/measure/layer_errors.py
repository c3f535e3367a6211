"""The errors that quantization adds to weights and outputs, layer by layer."""

import numpy as np
import torch
from torch import nn

from utils import metrics
from utils.backends.base import Converted, Deployed, Layer, Lowered
from utils.quantize.exact import ExactInterpreter
from utils.quantize.layers import outputs, weighted
from utils.quantize.modules import QuantizedLayer
from utils.quantize.network import Quantized


@torch.inference_mode()
def errors(deployed: Deployed, images: torch.Tensor) -> list[dict]:
    """Compute signal-to-quantization-noise ratios (dB) of all convolutions and linear layers.

    Returns one dict for each layer, in order of computation. `weight_sqnr_db` compares the layer's
    weights with FP32. `output_sqnr_db` compares its output on `images` (n, 3, 224, 224), before the
    activation function; it includes the errors of all layers before it. A lowered network's outputs
    come from its exact execution. None means no difference at all, or weights that cannot be read.
    The list is empty if nothing was converted.
    """
    if isinstance(deployed, Lowered):
        network = deployed.quantized.fp32
        actual, layers = _exact(deployed.quantized, images.cpu())
    elif isinstance(deployed, Converted):
        network, layers = deployed.fp32, deployed.layers
        with outputs({name: layer.module for name, layer in layers.items()}) as actual:
            deployed.predict(images.to(_device(network)))
    else:
        return []
    fp32 = weighted(network)
    with outputs(fp32) as expected:
        network(images.to(_device(network)))
    return [
        {
            "layer": name,
            "kind": type(fp32[name]).__name__,
            "parameters": fp32[name].weight.numel(),
            "weight_sqnr_db": _sqnr_db(fp32[name].weight, layers[name].weight),
            "output_sqnr_db": _sqnr_db(output, actual[name]),
        }
        for name, output in expected.items()
    ]


def _exact(
    quantized: Quantized, images: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, Layer]]:
    """Return the layers' outputs in exact execution, float32, and the layers, by name."""
    actual: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        actual[name] = output.float()

    ExactInterpreter(quantized, keep).run(images.double())
    layers = {}
    for name in actual:
        module = quantized.network.get_submodule(name)
        weight = module.values() if isinstance(module, QuantizedLayer) else module.weight
        layers[name] = Layer(module, weight)
    return actual, layers


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _sqnr_db(fp32: torch.Tensor, quantized: torch.Tensor) -> float | None:
    return metrics.sqnr_db(_array(fp32), _array(quantized))


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
