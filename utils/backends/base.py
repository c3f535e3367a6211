"""The interface of a backend, and its description of a deployed network."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from utils.quantize.layers import WEIGHTED, weighted
from utils.training.checkpoints import Checkpoint
from utils.training.loop import Predictor

__all__ = ["Backend", "Deployed", "Layer", "Predictor", "Stored", "plain_layers", "stored_parameters"]


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
    weight: torch.Tensor | None  # values of the rounded weights, float32; None if inaccessible
    relu: bool = False  # whether the output includes the layer's ReLU


@dataclass(frozen=True)
class Deployed:
    """A network as a backend runs it, before it is written to a file."""

    backend: "Backend"
    predict: Predictor
    save: Callable[[Path], None] | Path  # writes the artifact to a path, or is its path
    network: nn.Module  # what `predict` runs
    layers: dict[str, Layer]  # of `network`, by their names in the float network
    stored: tuple[Stored, ...]  # all numbers in the file
    reference: nn.Module | None = None  # the same layers in FP32; None if nothing was converted
    fake_quant: nn.Module | None = None  # the network that QAT trained, rounding in FP32
    facts: dict = field(default_factory=dict)  # further facts for the record, JSON-serializable


class Backend(Protocol):
    """An engine that deploys networks and runs them.

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

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert a float `model` by PTQ as `recipe` says.

        Ranges come from the calibration `images`, float32 (n, 3, 224, 224), normalised.
        """

    def training(self, recipe: dict) -> tuple[str, dict]:
        """Return a short tag, and all settings of this backend that decide the result of QAT.

        Backends with equal settings share one training. The tag is part of the checkpoint's name.
        """

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """Return a trainable copy of `model` that rounds as the deployed network will (QAT).

        Ranges start from the calibration `images`, float32 (n, 3, 224, 224), normalised.
        """

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert the network that `prepare` returned, once QAT has trained it.

        Only the structure of the float `model` is used, not its weights. `images` are those for
        calibration, as in `prepare`.
        """

    def load(self, path: Path, device: str) -> Predictor:
        """Load the artifact at `path` on `device`, ready to run."""


def plain_layers(network: nn.Module) -> dict[str, Layer]:
    """Return the layers of a network that has the modules of the float network."""
    return {name: Layer(module, module.weight) for name, module in weighted(network).items()}


def stored_parameters(network: nn.Module) -> tuple[Stored, ...]:
    """Return the parameters of a network as `Stored`, in their present number formats."""
    return tuple(
        Stored(
            parameter.numel(), 8 * parameter.element_size(), path if isinstance(module, WEIGHTED) and name == "weight" else None
        )
        for path, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    )
