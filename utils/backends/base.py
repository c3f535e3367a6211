"""The roles of a backend, and its description of a deployed network.

A backend plays up to three roles:
- *run*: `problem` and `load`. Every backend runs artifacts.
- *deploy*: from a network to a file. `deploy` takes a `Quantized`, see `Lowering` in lowering.py;
  `deploy_half` takes a float network, for formats of 16 bits; `deploy_fp32` a trained checkpoint.
- *train*: `training_config`, `prepare` and `convert`, for QAT.
None of them needs a `torch.nn.Module` where the engine has none.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from utils.quantize import floating
from utils.quantize.layers import WEIGHTED, weighted
from utils.quantize.network import Quantized
from utils.recipes import Recipe

if TYPE_CHECKING:
    from utils.backends.operator_times import Timed

# From images float32 (n, 3, 224, 224), normalised, to logits float32 (n, 2).
Predictor = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A group of numbers in an artifact's file: weights, biases or normalisation parameters."""

    count: int
    bits: int  # of each number
    layer: str | None = None  # convolution or linear layer of these weights; None for other numbers


@dataclass(frozen=True)
class Layer:
    """A deployed convolution or linear layer, to compare with the float layer of its name."""

    module: nn.Module  # its output is the layer's output
    weight: torch.Tensor  # values of the rounded weights


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A network as a backend runs it.

    `predict` and `network`, the module that it runs, are there if torch runs the network. Otherwise
    the file alone answers.
    """

    backend: "Backend"
    stored: tuple[Stored, ...]  # all numbers in the file
    save: Callable[[Path], None] | None = None  # writes the artifact; None if it is `file` already
    file: Path | None = None
    predict: Predictor | None = None
    network: nn.Module | None = None
    facts: dict = field(default_factory=dict)  # for the record, JSON-serializable


@dataclass(frozen=True, kw_only=True)
class Lowered(Deployed):
    """A `Quantized` network as a backend runs it: the file should answer as it does."""

    quantized: Quantized


@dataclass(frozen=True, kw_only=True)
class Converted(Deployed):
    """A float network that torch runs in another format, next to the same network in FP32."""

    fp32: nn.Module
    layers: dict[str, Layer]  # of `network`, by their names in `fp32`


class Backend(ABC):
    """The role *run*: an engine that loads an artifact and runs it.

    `name` is the value of `--backend`; `suffix` ends the file names of its artifacts.
    """

    name: str
    suffix: str
    layout: torch.memory_format  # fastest memory layout of images, used for timing
    # Whether its number format overflows early. If so, the outputs of all layers are checked while
    # the test images run.
    watched = False

    @abstractmethod
    def problem(self) -> str | None:
        """Return why this backend cannot run on this machine, in a few words; None if it can."""

    @abstractmethod
    def load(self, path: Path, device: str) -> Predictor:
        """Load the artifact at `path` on `device`, ready to run.

        An engine that competes for the fastest FP32 also loads the FP32 checkpoint, a file `.pt`.
        """

    def kernels(self, path: Path) -> dict | None:
        """Count the kernels that run the artifact at `path`; None if the engine does not say.

        They are read from the graph that the engine compiled: `layers` and `integer_layers`, as
        `layer_counts.counted` describes them, and further counts in the engine's words. Backends
        that only compute in floats need not say it: see `layer_counts.integer_layers`.
        """
        return None

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> "list[Timed] | None":
        """Return the times of the operators of the artifact at `path`, means of `runs` on `x`.

        None if the engine does not say.
        """
        return None


class Floating(ABC):
    """The role *train* for engines that compute in float formats."""

    half = False

    def training_config(self, recipe: Recipe) -> tuple[str, dict]:
        """Return a short tag, and what decides the result of QAT here besides the recipe.

        Backends with equal settings share one training. The tag is part of the checkpoint's name.
        """
        return "", {"format": "fp16" if self.half else "fp32"}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: Recipe) -> nn.Module:
        """Return a trainable copy of `model` that rounds as the deployed network will.

        Ranges come from the calibration `images`, float32 (n, 3, 224, 224), normalised.
        """
        return floating.floating(model, images, self.half)

    @abstractmethod
    def convert(self, trained: nn.Module, model: nn.Module, recipe: Recipe) -> Deployed:
        """Deploy the network that `prepare` returned, once QAT has trained it.

        Only the structure of the float `model` is used, not its weights.
        """


def float_layers(network: nn.Module) -> dict[str, Layer]:
    """Return the layers of a network that has the modules of the float network."""
    return {name: Layer(module, module.weight) for name, module in weighted(network).items()}


def stored_parameters(network: nn.Module) -> tuple[Stored, ...]:
    """Return the parameters of a network as `Stored`, in their present number formats."""
    stored = []
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, WEIGHTED) and name == "weight"
            bits = 8 * parameter.element_size()
            stored.append(Stored(parameter.numel(), bits, path if is_weight else None))
    return tuple(stored)
