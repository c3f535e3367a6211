"""Where a network loses its accuracy: layer by layer, what conversion does to weights and outputs."""

import numpy as np
import torch
from torch import nn

from utils import metrics, watch
from utils.backends.base import Deployed


@torch.inference_mode()
def layers(deployed: Deployed, images: torch.Tensor) -> list[dict]:
    """Signal-to-quantization-noise ratios in dB of every convolution and linear layer, in order of computation.

    `weight_sqnr_db` compares the layer's weights with the FP32 ones that they were rounded from, `output_sqnr_db` its output on
    `images` (n, 3, 224, 224), the errors of all layers before it included. None stands for no difference at all. An empty
    list where nothing was converted.
    """
    if deployed.reference is None:
        return []
    device = next(deployed.reference.parameters()).device
    with watch.outputs(deployed.reference) as float_outputs:
        deployed.reference(images.to(device))
    with watch.outputs(deployed.network) as outputs:
        deployed.predict(images.to(device))
    found = []
    for name, expected in float_outputs.items():
        layer, reference = deployed.network.get_submodule(name), deployed.reference.get_submodule(name)
        if "ReLU" in type(layer).__name__:  # computed in one with its activation
            expected = expected.clamp_min(0)
        weights = None if isinstance(layer, nn.Sequential) else metrics.sqnr_db(_array(reference.weight), _array(_weight(layer)))
        found.append({
            "layer": name,
            "kind": type(reference).__name__,
            "parameters": reference.weight.numel(),
            "weight_sqnr_db": weights,
            "output_sqnr_db": metrics.sqnr_db(_array(expected), _array(outputs[name])),
        })  # fmt: skip
    return found


def _weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight() if callable(layer.weight) else layer.weight  # packed modules have a method


def _array(x: torch.Tensor) -> np.ndarray:
    return (x.dequantize() if x.is_quantized else x).detach().float().cpu().numpy()
