"""What every backend provides."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from utils.checkpoints import Checkpoint

Predictor = Callable[[torch.Tensor], torch.Tensor]  # float32 (n, 3, 224, 224), normalised -> float32 logits (n, 2)


def weight_modules(model: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers of a float model."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@dataclass(frozen=True)
class Deployed:
    """A model as a backend would run it, before it is written to its file."""

    backend: "Backend"
    predict: Predictor
    save: Callable[[Path], None] | Path  # writes the artifact to a path, or says where it lies already
    network: nn.Module  # what `predict` runs, its layers named as in the float model
    reference: nn.Module | None  # the same in FP32, layer for layer; None where nothing was converted
    weight_modules: int  # convolutions and linear layers in the network
    quantized_modules: int  # of these, how many compute on quantized weights
    parameters: int  # numbers in weights and biases, packed ones included
    quantized_parameters: int  # of these, how many are stored quantized
    weight_bytes: int  # that these numbers take, each in its own format: what a file without anything else would have
    fake_quant: nn.Module | None = None  # the network that QAT trained, rounding in FP32
    facts: dict = field(default_factory=dict)  # what else a reader should know, JSON-able


class Backend(Protocol):
    """An engine. `name` is what `--backend` takes, `suffix` ends its artifacts' names."""

    name: str
    suffix: str
    layout: torch.memory_format  # of the images it runs fastest on; what timing gives it
    simulated: bool  # computes what other hardware would, in float: accuracy counts, speed says nothing
    watched: bool  # its number format overflows early: every layer's output is checked while the test images run

    def problem(self, device: str) -> str | None:
        """Why this backend cannot run here, in a few words; None if it can."""

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """PTQ: convert a float `model` as `recipe` says, with ranges from calibration `images` (n, 3, 224, 224)."""

    def training(self, recipe: dict) -> tuple[str, dict]:
        """QAT: a short tag, and all settings of this backend that decide what is trained; equal ones share one training."""

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """QAT: a trainable copy of `model` that rounds as the deployed network will; ranges start from `images`."""

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """QAT: convert what `prepare` gave, trained; of the float `model` only the structure is used."""

    def load(self, path: Path, device: str) -> Predictor:
        """The artifact at `path`, ready to run."""
