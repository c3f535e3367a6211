"""FP32 through `torch.compile` (Inductor), compiled when the FP32 checkpoint is loaded."""

import os
import shutil
from pathlib import Path

import torch

from utils.backends.base import Predictor
from utils.backends.native import Native


class Compiled(Native):
    """`torch.compile` with frozen weights, and a separate compilation for every batch size.

    Kernels of a fixed size are faster.
    """

    name = "compile"

    def problem(self) -> str | None:
        missing = (
            not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None
        )
        return "torch.compile needs a C++ compiler" if missing else None

    def load(self, path: Path, device: str) -> Predictor:
        import torch._inductor.config  # slow to import, and nothing else needs it

        torch._inductor.config.freezing = True
        torch._dynamo.config.cache_size_limit = 64  # one entry per batch size; the default is 8
        return torch.compile(super().load(path, device), dynamic=False)


ENGINES = {"compile": Compiled()}
