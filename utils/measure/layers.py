"""Errors that conversion adds to weights and outputs, layer by layer."""

import numpy as np
import torch

from utils import metrics
from utils.backends.base import Deployed
from utils.quantize.layers import outputs, weighted


@torch.inference_mode()
def errors(deployed: Deployed, images: torch.Tensor) -> list[dict]:
    """Signal-to-quantization-noise ratios (dB) of all convolutions and linear layers.

    Returns one dict for each layer, in order of computation. `weight_sqnr_db` compares the layer's
    weights with the FP32 weights that they were rounded from. `output_sqnr_db` compares its output
    on `images` (n, 3, 224, 224), which includes the errors of all layers before it. None means no
    difference at all, or weights that cannot be read. The list is empty if nothing was converted.
    """
    if deployed.reference is None:
        return []
    images = images.to(next(deployed.reference.parameters()).device)
    reference = weighted(deployed.reference)
    with outputs(reference) as expected:
        deployed.reference(images)
    with outputs({name: layer.module for name, layer in deployed.layers.items()}) as actual:
        deployed.predict(images)
    rows = []
    for name, output in expected.items():
        layer, weight = deployed.layers[name], reference[name].weight
        if layer.relu:
            output = output.clamp_min(0)
        rows.append({
            "layer": name,
            "kind": type(reference[name]).__name__,
            "parameters": weight.numel(),
            "weight_sqnr_db": None if layer.weight is None else metrics.sqnr_db(_array(weight), _array(layer.weight)),
            "output_sqnr_db": metrics.sqnr_db(_array(output), _array(actual[name])),
        })  # fmt: skip
    return rows


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
