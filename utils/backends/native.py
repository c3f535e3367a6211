"""Eager FP32 PyTorch: the baseline of all comparisons, and the control of QAT."""

import copy
from pathlib import Path

import torch
from torch import nn

from utils import architectures
from utils.backends.base import Backend, Deployed, Floating, Predictor, stored_parameters
from utils.backends.operator_times import ByTorch
from utils.quantize import floating
from utils.recipes import Recipe
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoint


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
        return (
            architectures.rebuild(checkpoints.read(path))
            .eval()
            .to(device, memory_format=torch.channels_last)
        )


ENGINES = {"native": Native()}
