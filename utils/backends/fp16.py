"""FP16 in PyTorch: `half` stores and computes all in FP16, `amp` casts where autocast does.

`half` is the dissertation's "direct": `.half()`, with a file of half the size. `amp` keeps FP32
weights in the file and converts them in every run; softmax-like operations and sums stay in FP32
(torch.autocast). A processor without FP16 arithmetic emulates both, at as little as a hundredth of
its FP32 speed; that speed is measured and tagged, never hidden.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from utils import environment
from utils.backends.base import Deployed, Halved, Predictor, plain_layers, stored_parameters
from utils.quantize import qat
from utils.training import architectures
from utils.training.checkpoints import Checkpoint

NATIVE_CPU = {"avx512_fp16", "amx_fp16", "asimdhp"}
NATIVE_CUDA = (5, 3)  # the first compute capability with FP16 arithmetic


def native(device: str) -> bool:
    """Return whether `device` has FP16 arithmetic in hardware."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= NATIVE_CUDA
    return bool(NATIVE_CPU & set(environment.cpu()[1]))


class Half(nn.Module):
    """A network in FP16 with FP32 inputs and outputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.half()).float()


class Autocast(nn.Module):
    """An FP32 network whose operators run in FP16 where autocast considers it safe."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.float16):
            return self.network(x).float()


class FP16(Halved):
    """The backends `half` and `amp`: FP16 on CPU or CUDA."""

    watched = True  # the largest FP16 number is 65,504
    layout = torch.channels_last

    def __init__(self, name: str, wrapper: type[nn.Module]):
        self.name, self.wrapper, self.suffix = name, wrapper, f".{name}.pt"

    def problem(self) -> str | None:
        return None

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert a float `model`; `images` and `recipe` are not used."""
        reference = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        network = self.wrapper(copy.deepcopy(reference))
        weights = {key: value.detach().cpu().contiguous() for key, value in network.network.state_dict().items()}
        return Deployed(
            backend=self,
            predict=network,
            save=lambda path: torch.save({"architecture": model.architecture, "state_dict": weights}, path),
            network=network.network,
            layers=plain_layers(network.network),
            stored=stored_parameters(network.network),
            reference=reference,
        )

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        return self.quantize(qat.plain(trained.model, model), images, recipe)

    def load(self, path: Path, device: str) -> Predictor:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return self.wrapper(architectures.rebuild(content)).eval().to(device, memory_format=torch.channels_last)


ENGINES = {engine.name: engine for engine in (FP16("half", Half), FP16("amp", Autocast))}
