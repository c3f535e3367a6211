"""FP32 as frozen TorchScript: no Python between operators, and BatchNorm is folded.

Its logits are those of eager FP32, up to the order of summation. It writes no artifact: the FP32
checkpoint is traced when it is loaded.
"""

import warnings
from pathlib import Path

import torch

from utils.backends.base import Predictor
from utils.backends.native import Native

SHAPE = (2, 3, 224, 224)  # of the example; tracing treats a batch of one as a constant


class Frozen(Native):
    """The backend of FP32 networks that are traced to TorchScript and frozen."""

    name = "frozen"

    def load(self, path: Path, device: str) -> Predictor:
        model = super().load(path, device)
        example = torch.zeros(SHAPE, device=device).to(memory_format=torch.channels_last)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript's deprecation
            return torch.jit.freeze(torch.jit.trace(model, example))


ENGINES = {"frozen": Frozen()}
