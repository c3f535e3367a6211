"""Where a network loses its accuracy: layer by layer, what conversion does to weights and outputs."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from utils import metrics
from utils.backends.base import Deployed

WEIGHTED = (nn.Conv2d, nn.Linear)


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
    with _outputs(deployed.reference) as float_outputs:
        deployed.reference(images.to(device))
    with _outputs(deployed.network) as outputs:
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


def _weighted(module: nn.Module) -> bool:
    """Convolutions and linear layers: float, packed, or (a kind of Sequential) kept in FP32 and fused with what follows."""
    fused = isinstance(module, nn.Sequential) and type(module).__module__.startswith("torch.ao.nn.intrinsic")
    return fused or isinstance(module, WEIGHTED) or callable(getattr(module, "weight", None))


def _array(x: torch.Tensor) -> np.ndarray:
    return (x.dequantize() if x.is_quantized else x).detach().float().cpu().numpy()


@contextlib.contextmanager
def _outputs(network: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Collect, while images run through `network`, the output of each weighted layer; in order of computation."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        found[name] = output.clone()  # activation functions may work in place

    with _hooked(network, _weighted, keep):
        yield found


@contextlib.contextmanager
def extremes(network: nn.Module) -> Iterator[dict]:
    """Watch every layer's output while images run through `network`: filled on leaving, for all of them together.

    `nonfinite`: how many values were infinite or not a number; `largest`: the largest finite magnitude, and `largest_in`, where.
    """
    seen: dict[str, torch.Tensor] = {}
    report: dict = {}

    def keep(name: str, output: torch.Tensor) -> None:
        finite = torch.isfinite(output)
        largest = torch.where(finite, output.float().abs(), 0.0).max()
        now = torch.stack([(~finite).sum().double(), largest.double()])
        old = seen.get(name, torch.zeros_like(now))
        seen[name] = torch.stack([old[0] + now[0], torch.maximum(old[1], now[1])])

    with _hooked(network, lambda module: not any(module.children()), keep):
        yield report
    worst = max(seen, key=lambda name: seen[name][1].item())
    total = sum(int(own[0]) for own in seen.values())
    report |= {"nonfinite": total, "largest": seen[worst][1].item(), "largest_in": worst}


@contextlib.contextmanager
def _hooked(network: nn.Module, wanted, keep) -> Iterator[None]:
    hooks = [
        module.register_forward_hook(lambda _module, _input, output, name=name: keep(name, output))
        for name, module in network.named_modules()
        if wanted(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
