"""What every backend provides."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

Predictor = Callable[[torch.Tensor], torch.Tensor]  # float32 (n, 3, 224, 224), normalised -> float32 logits (n, 2)


@dataclass(frozen=True)
class Deployed:
    """A model as a backend would run it, before it is written to its file."""

    backend: "Backend"
    predict: Predictor
    save: Callable[[Path], None]  # writes the artifact to a path
    weight_modules: int  # convolutions and linear layers in the network
    quantized_modules: int  # of these, how many compute on quantized weights
    parameters: int  # numbers in weights and biases, packed ones included
    quantized_parameters: int  # of these, how many are stored quantized
    facts: dict = field(default_factory=dict)  # what else a reader should know, JSON-able


class Backend(Protocol):
    """An engine. `name` is what `--backend` takes, `suffix` ends its artifacts' names."""

    name: str
    suffix: str
    simulated: bool  # computes what other hardware would, in float: accuracy counts, speed says nothing

    def problem(self, device: str) -> str | None:
        """Why this backend cannot run here, in a few words; None if it can."""

    def load(self, path: Path, device: str) -> Predictor:
        """The artifact at `path`, ready to run."""
