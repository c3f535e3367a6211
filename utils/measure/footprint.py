"""Cost of a network besides time: bytes in its file, operations, memory for activations."""

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

FULL = 32  # bits of a number that is not quantized


def macs(model: nn.Module) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer for one 224x224 image.

    They are half of what torch's FlopCounterMode counts, which counts nothing in other operators.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        copy.deepcopy(model).cpu().eval()(torch.zeros(1, 3, 224, 224))
    counts, root = counter.get_flop_counts(), type(model).__name__
    return {name: sum(counts[f"{root}.{name}"].values()) // 2 for name in weighted(model)}


def of_operations(model: nn.Module, stored: Iterable[Stored]) -> dict[str, float | int]:
    """Compute the columns of results.csv that count operations.

    `macs`: multiply-accumulates of one image. `quantized_macs_share`: share of them in layers whose
    weights have fewer than 32 bits in the file, which `stored` describes. `model` is the float network.
    """
    counts = macs(model)
    quantized = {
        numbers.layer for numbers in stored if numbers.layer is not None and numbers.bits < FULL
    }
    total = sum(counts.values())
    return {"macs": total, "quantized_macs_share": sum(counts[name] for name in quantized) / total}


def size_mb(path: Path) -> float:
    """Size of a file in MiB."""
    return path.stat().st_size / MIB


def of_numbers(stored: Iterable[Stored]) -> dict[str, float | int]:
    """Compute the columns of results.csv that count the numbers in an artifact's file.

    `parameters`: weights and biases. `theoretical_mb`: MiB that these take, whatever else the file
    holds. `weight_modules`: convolutions and linear layers. `quantized_modules`: those whose
    weights have fewer than 32 bits in the file. `quantized_share`: share of the parameters that
    have fewer than 32 bits in the file.
    """
    stored = list(stored)
    layers = {numbers.layer: numbers.bits for numbers in stored if numbers.layer is not None}
    count = sum(numbers.count for numbers in stored)
    return {
        "theoretical_mb": sum(numbers.count * numbers.bits for numbers in stored) / 8 / MIB,
        "parameters": count,
        "weight_modules": len(layers),
        "quantized_modules": sum(bits < FULL for bits in layers.values()),
        "quantized_share": sum(numbers.count for numbers in stored if numbers.bits < FULL) / count,
    }


class LiveBytes(TorchDispatchMode):
    """Count the bytes of activations while this context is active: `now` alive, and the `peak`.

    A view counts once, with its base. `weights` are no activations, nor are tensors made from
    weights alone, like the FP16 copies that autocast makes. Scratch memory within an operator is
    not seen.
    """

    def __init__(self, x: torch.Tensor, weights: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.weights = {_storage(weight) for weight in weights}
        self.alive = {_storage(x)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = [
            _storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        ]
        made = function(*args, **(kwargs or {}))
        of_weights = bool(read) and self.weights.issuperset(read)
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := _storage(tensor)) not in self.alive | self.weights
            ):
                self._add(tensor.untyped_storage(), key, self.weights if of_weights else self.alive)
        return made

    def _add(self, storage: torch.UntypedStorage, key: int, kind: set[int]) -> None:
        size = 0 if kind is self.weights else storage.nbytes()
        kind.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, kind, size)

    def _remove(self, key: int, kind: set[int], size: int) -> None:
        kind.discard(key)
        self.now -= size


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activation_mb(predict, network: nn.Module, x: torch.Tensor) -> float:
    """Peak MiB of activations alive at once while `predict` runs `network` on `x`.

    `x` itself is not counted.
    """
    with torch.inference_mode(), LiveBytes(x, [*network.parameters(), *network.buffers()]) as live:
        predict(x)
    return live.peak / MIB
