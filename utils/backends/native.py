"""Eager FP32 PyTorch: the baseline of all comparisons, and the control of QAT."""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import nn

from utils import architectures
from utils.backends.base import Deployed, Floating, Predictor, plain_layers, stored_parameters
from utils.backends.operator_times import ByTorch
from utils.quantize import qat
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoint


class Native(ByTorch, Floating):
    """Eager FP32 with channels-last memory layout, which is faster on both CPU and GPU."""

    name, suffix, watched = "native", ".pt", False
    layout = torch.channels_last

    def problem(self) -> str | None:
        return None

    def deploy(self, trained: Checkpoint) -> Deployed:
        """Deploy a trained FP32 model as it is; its artifact is its checkpoint."""
        model = copy.deepcopy(trained.model).to(memory_format=torch.channels_last)
        return Deployed(
            backend=self,
            predict=model,
            save=trained.path,
            network=model,
            layers=plain_layers(model),
            stored=stored_parameters(model),
        )

    def convert(
        self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict
    ) -> Deployed:
        plain = qat.plain(trained.model, model)
        deployed = self.deploy(Checkpoint(trained.path, plain, trained.sha256, trained.training))
        return dataclasses.replace(deployed, save=lambda path: checkpoints.export(path, plain))

    def load(self, path: Path, device: str) -> Predictor:
        return (
            architectures.rebuild(checkpoints.read(path))
            .eval()
            .to(device, memory_format=torch.channels_last)
        )


ENGINES = {"native": Native()}
