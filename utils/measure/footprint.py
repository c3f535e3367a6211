"""The cost of a network besides time: bytes in its file, operations, memory for activations."""

import copy
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from utils.backends.base import Stored
from utils.environment import MIB
from utils.quantize.layers import weighted

FULL = 32  # bits of an unquantized number


def macs(model: nn.Module) -> dict[str, int]:
    """Count the multiply-accumulates of each convolution and linear layer for one 224x224 image.

    torch's FlopCounterMode counts two operations for each, and none in the study's other operators.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        copy.deepcopy(model).cpu().eval()(torch.zeros(1, 3, 224, 224))
    counts, root = counter.get_flop_counts(), type(model).__name__
    return {name: sum(counts[f"{root}.{name}"].values()) // 2 for name in weighted(model)}


def of_operations(model: nn.Module, stored: Iterable[Stored]) -> dict[str, float | int]:
    """Compute the columns of results.csv that count operations.

    `macs`: multiply-accumulates for one image. `quantized_macs_share`: their share in layers whose
    weights have fewer than 32 bits in the file. `model` is the float network, and `stored` has the
    numbers in the file.
    """
    counts = macs(model)
    total = sum(counts.values())
    quantized = sum(counts[name] for name, bits in _bits(stored).items() if bits < FULL)
    return {"macs": total, "quantized_macs_share": quantized / total}


def size_mb(path: Path) -> float:
    """Return the size of a file in MiB."""
    return path.stat().st_size / MIB


def of_numbers(stored: Iterable[Stored]) -> dict[str, float | int]:
    """Compute the columns of results.csv that count the numbers in an artifact's file.

    `parameters`: weights and biases. `theoretical_mb`: MiB of the parameters alone.
    `weight_modules`: convolutions and linear layers. `quantized_modules`: layers whose weights have
    fewer than 32 bits in the file. `quantized_share`: share of the parameters that have fewer than
    32 bits in the file.
    """
    stored = list(stored)
    layers = _bits(stored)
    count = sum(numbers.count for numbers in stored)
    return {
        "theoretical_mb": sum(numbers.count * numbers.bits for numbers in stored) / 8 / MIB,
        "parameters": count,
        "weight_modules": len(layers),
        "quantized_modules": sum(bits < FULL for bits in layers.values()),
        "quantized_share": sum(numbers.count for numbers in stored if numbers.bits < FULL) / count,
    }


def _bits(stored: Iterable[Stored]) -> dict[str, int]:
    """Return the bits of a weight in the file, by layer."""
    return {numbers.layer: numbers.bits for numbers in stored if numbers.layer is not None}


class LiveBytes(TorchDispatchMode):
    """Count the bytes of activations while this context is active: `now` alive, and the `peak`.

    A view counts once, with its base. Neither `weights` count, nor tensors made from weights alone,
    such as the FP16 copies that autocast makes. Scratch memory within an operator is not seen.
    """

    def __init__(self, x: torch.Tensor, weights: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.weights = {_storage(weight) for weight in weights}
        self.alive = {_storage(x)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        of_weights = bool(read) and read <= self.weights
        for tensor in _tensors(made):
            key = _storage(tensor)
            if key in self.alive or key in self.weights:
                continue
            if of_weights:
                self._add(tensor, self.weights, 0)
            else:
                self._add(tensor, self.alive, tensor.untyped_storage().nbytes())
        return made

    def _add(self, tensor: torch.Tensor, kind: set[int], size: int) -> None:
        """Count a new storage, until it is freed."""
        key = _storage(tensor)
        kind.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor.untyped_storage(), self._remove, key, kind, size)

    def _remove(self, key: int, kind: set[int], size: int) -> None:
        kind.discard(key)
        self.now -= size


def _tensors(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activation_mb(predict, network: nn.Module, x: torch.Tensor) -> float:
    """Measure the peak MiB of activations alive at once while `predict` runs `network` on `x`.

    `x` itself does not count.
    """
    weights = [*network.parameters(), *network.buffers()]
    with torch.inference_mode(), LiveBytes(x, weights) as live:
        predict(x)
    return live.peak / MIB
