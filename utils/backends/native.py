"""Eager FP32 PyTorch: the baseline that everything else is compared with."""

import copy
import shutil
from pathlib import Path

import torch
from torch import nn

from utils import architectures, checkpoints
from utils.backends.base import Deployed, Predictor


class Native:
    """Eager FP32 with the memory layout (channels last) that is the faster one on CPU and GPU alike."""

    name, suffix, simulated = "native", ".pt", False

    def problem(self, device: str) -> str | None:
        return None

    def deploy(self, checkpoint: checkpoints.Checkpoint, device: str) -> Deployed:
        """The FP32 baseline itself: its artifact is its checkpoint."""
        model = copy.deepcopy(checkpoint.model).to(device, memory_format=torch.channels_last)
        weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        return Deployed(
            backend=self,
            predict=model,
            save=lambda path: shutil.copyfile(checkpoint.path, path),
            weight_modules=len(weighted),
            quantized_modules=0,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            quantized_parameters=0,
        )

    def load(self, path: Path, device: str) -> Predictor:
        content = checkpoints.read(path)
        model = architectures.build(content["architecture"])
        model.load_state_dict(content["state_dict"])
        return model.eval().to(device, memory_format=torch.channels_last)
