"""FP32 in PyTorch: eager, as frozen TorchScript, and through `torch.compile`.

Eager FP32, `native`, is the baseline of all comparisons and the control of QAT. The other two write
no artifact: they trace or compile the FP32 checkpoint when they load it. Their logits equal eager
FP32 up to the order of summation.
"""

import copy
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

from utils import architectures
from utils.backends import tf32
from utils.backends.base import (
    Backend,
    Deployed,
    Floating,
    Predictor,
    stored_parameters,
)
from utils.backends.operator_times import ByTorch
from utils.quantize import floating
from utils.recipes import Recipe
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoint

EXAMPLE_SHAPE = (2, 3, 224, 224)  # tracing would treat a batch of one as a constant
COMPILED_BATCH_SIZES = 64  # kept by torch.compile, one entry each; its default is 8


class Native(ByTorch, Floating, Backend):
    """Eager FP32 with channels-last memory layout, which is faster on both CPU and GPU."""

    name, suffix = "native", ".pt"
    layout = torch.channels_last

    def problem(self) -> str | None:
        return None

    def deploy_fp32(self, trained: Checkpoint) -> Deployed:
        """Deploy a trained FP32 model as it is; its artifact is its checkpoint."""
        model = copy.deepcopy(trained.model).to(memory_format=torch.channels_last)
        return Deployed(
            backend=self,
            file=trained.path,
            predict=model,
            network=model,
            stored=stored_parameters(model),
        )

    def convert(self, trained: nn.Module, model: nn.Module, recipe: Recipe) -> Deployed:
        plain = floating.plain(trained, model)
        network = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        return Deployed(
            backend=self,
            save=lambda path: checkpoints.export(path, plain),
            predict=network,
            network=network,
            stored=stored_parameters(network),
        )

    def load(self, path: Path, device: str) -> Predictor:
        tf32.forbid(device)
        return (
            architectures.rebuild(checkpoints.read(path))
            .eval()
            .to(device, memory_format=torch.channels_last)
        )


class Frozen(Native):
    """Frozen TorchScript: BatchNorm is folded, and no Python runs between operators."""

    name = "frozen"

    def load(self, path: Path, device: str) -> Predictor:
        model = super().load(path, device)
        example = torch.zeros(EXAMPLE_SHAPE, device=device).to(memory_format=torch.channels_last)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript's deprecation
            return torch.jit.freeze(torch.jit.trace(model, example))


class Compiled(Native):
    """`torch.compile` with frozen weights, compiled again for every batch size.

    Kernels of a fixed size are faster.
    """

    name = "compile"

    def problem(self) -> str | None:
        has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
        if torch.cuda.is_available() or has_compiler:
            return None
        return "torch.compile needs a C++ compiler"

    def load(self, path: Path, device: str) -> Predictor:
        import torch._inductor.config  # slow to import, and only needed here

        torch._inductor.config.freezing = True
        torch._dynamo.config.cache_size_limit = COMPILED_BATCH_SIZES
        return torch.compile(super().load(path, device), dynamic=False)


ENGINES = {engine.name: engine for engine in (Native(), Frozen(), Compiled())}
