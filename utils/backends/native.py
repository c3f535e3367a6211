"""Eager FP32 PyTorch: the baseline that everything else is compared with, and the control of QAT."""

import copy
from pathlib import Path

import torch
from torch import nn

from utils import architectures, checkpoints
from utils.backends.base import Deployed, Predictor, weight_modules
from utils.checkpoints import Checkpoint


class Native:
    """Eager FP32 with the memory layout (channels last) that is the faster one on CPU and GPU alike."""

    name, suffix, simulated, watched = "native", ".pt", False, False
    layout = torch.channels_last

    def problem(self, device: str) -> str | None:
        return None

    def deploy(self, trained: Checkpoint) -> Deployed:
        """A trained FP32 model as it is: its artifact is its checkpoint."""
        model = copy.deepcopy(trained.model).to(memory_format=torch.channels_last)
        return Deployed(
            backend=self,
            predict=model,
            save=trained.path,
            network=model,
            reference=None,
            weight_modules=len(weight_modules(model)),
            quantized_modules=0,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            quantized_parameters=0,
            weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        )

    def training(self, recipe: dict) -> tuple[str, dict]:
        return "", {}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """The control: `model` itself, to be fine-tuned in FP32 by the schedule of its quantized siblings."""
        return copy.deepcopy(model)

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        return self.deploy(trained)

    def load(self, path: Path, device: str) -> Predictor:
        content = checkpoints.read(path)
        model = architectures.build(content["architecture"])
        model.load_state_dict(content["state_dict"])
        return model.eval().to(device, memory_format=torch.channels_last)
