"""The roles of a backend, and its description of a deployed network.

A backend plays up to three roles, and has the methods of those it plays:
- *run*: `problem` and `load`, of `Backend`. Every backend runs artifacts.
- *lower*: `lower` writes a `Quantized` network to a file; see `Lowering` in lowering.py. Backends of
  other number formats have `quantize`, which converts a float network.
- *train*: `training`, `prepare` and `convert`, for QAT.
None of them needs a `torch.nn.Module` where the engine has none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from utils.quantize import qat
from utils.quantize.layers import WEIGHTED, weighted
from utils.quantize.network import Quantized
from utils.training.checkpoints import Checkpoint
from utils.training.loop import Predictor

__all__ = [
    "Backend",
    "Deployed",
    "Floating",
    "Halved",
    "Layer",
    "Predictor",
    "Quantizing",
    "Stored",
    "Training",
    "plain_layers",
    "stored_parameters",
]


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


@dataclass(frozen=True)
class Deployed:
    """A network as a backend runs it, before it is written to a file.

    `predict`, `network` and `layers` are there if torch runs the network. Otherwise the file alone
    answers, and `quantized` says what it should answer.
    """

    backend: "Backend"
    save: Callable[[Path], None] | Path  # writes the artifact to a path, or is its path
    stored: tuple[Stored, ...]  # all numbers in the file
    predict: Predictor | None = None
    network: nn.Module | None = None  # what `predict` runs
    layers: dict[str, Layer] = field(
        default_factory=dict
    )  # of `network`, by their names in the float network
    fp32: nn.Module | None = None  # the same layers in FP32; None if nothing was converted
    quantized: Quantized | None = None  # what was lowered
    fake_quant: nn.Module | None = None  # the network that QAT trained, rounding in FP32
    facts: dict = field(default_factory=dict)  # further facts for the record, JSON-serializable


class Backend(Protocol):
    """The role *run*: an engine that loads an artifact and runs it.

    `name` is the value of `--backend`; `suffix` ends the file names of its artifacts.
    """

    name: str
    suffix: str
    layout: torch.memory_format  # fastest memory layout of images, used for timing
    # Whether its number format overflows early. If so, the outputs of all layers are checked while
    # the test images run.
    watched: bool

    def problem(self) -> str | None:
        """Return why this backend cannot run on this machine, in a few words; None if it can."""

    def load(self, path: Path, device: str) -> Predictor:
        """Load the artifact at `path` on `device`, ready to run.

        An engine that competes for the fastest FP32 also loads the FP32 checkpoint, a file `.pt`.
        """


class Quantizing(Protocol):
    """The role of a backend that converts float networks."""

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert a float `model` by PTQ as `recipe` says.

        Ranges come from the calibration `images`, float32 (n, 3, 224, 224), normalised.
        """


class Training(Protocol):
    """The role *train*: a backend whose rounding QAT can learn to live with."""

    def training(self, recipe: dict) -> tuple[str, dict]:
        """Return a short tag, and all settings of this backend that decide the result of QAT.

        Backends with equal settings share one training. The tag is part of the checkpoint's name.
        """

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """Return a trainable copy of `model` that rounds as the deployed network will (QAT).

        Ranges come from the calibration `images`, float32 (n, 3, 224, 224), normalised.
        """

    def convert(
        self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict
    ) -> Deployed:
        """Convert the network that `prepare` returned, once QAT has trained it.

        Only the structure of the float `model` is used, not its weights. `images` are those for
        calibration, as in `prepare`.
        """


class Floating:
    """Training for engines that compute in FP32."""

    half = False

    def training(self, recipe: dict) -> tuple[str, dict]:
        """Return no tag, and the format: the engines of one format share one training."""
        return "", {"format": "fp16" if self.half else "fp32"}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """Return a trainable network; see `qat.floating`."""
        return qat.floating(model, images, self.half)


class Halved(Floating):
    """Training for engines that compute in FP16."""

    half = True


def plain_layers(network: nn.Module) -> dict[str, Layer]:
    """Return the layers of a network that has the modules of the float network."""
    return {name: Layer(module, module.weight) for name, module in weighted(network).items()}


def stored_parameters(network: nn.Module) -> tuple[Stored, ...]:
    """Return the parameters of a network as `Stored`, in their present number formats."""
    return tuple(
        Stored(
            parameter.numel(),
            8 * parameter.element_size(),
            path if isinstance(module, WEIGHTED) and name == "weight" else None,
        )
        for path, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    )
