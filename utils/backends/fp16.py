"""FP16 in PyTorch, in two ways: `half` stores and computes everything in FP16, `amp` casts where autocast finds it safe.

`half` is the dissertation's "direct": `.half()`, a file of half the size. `amp` keeps FP32 weights in the file and converts them
in every run; softmax-like operations and sums stay in FP32 (torch.autocast). A processor without FP16 arithmetic emulates both,
at up to a hundredth of its FP32 speed: that is measured and tagged, never hidden.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from utils import architectures, environment
from utils.backends.base import Deployed, Predictor, weight_modules
from utils.checkpoints import Checkpoint

NATIVE_CPU = {"avx512_fp16", "amx_fp16", "asimdhp"}
NATIVE_CUDA = (5, 3)  # compute capability: the first with FP16 arithmetic


def native(device: str) -> bool:
    """Whether `device` computes in FP16 itself."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= NATIVE_CUDA
    return bool(NATIVE_CPU & set(environment.cpu()[1]))


class Half(nn.Module):
    """A network in FP16 that takes and gives FP32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.half()).float()


class Autocast(nn.Module):
    """An FP32 network that autocast runs in FP16 where that is safe."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.float16):
            return self.network(x).float()


class FP16:
    """FP16 on CPU or CUDA, by `half` or by `amp`."""

    simulated, watched = False, True  # FP16 ends at 65,504
    layout = torch.channels_last

    def __init__(self, name: str, wrapper: type[nn.Module]):
        self.name, self.wrapper, self.suffix = name, wrapper, f".{name}.pt"

    def problem(self, device: str) -> str | None:
        return None

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert `model`; neither `images` nor a recipe are needed."""
        reference = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        network = self.wrapper(copy.deepcopy(reference))
        weights = {key: value.detach().cpu().contiguous() for key, value in network.network.state_dict().items()}
        layers = len(weight_modules(model))
        numbers = sum(parameter.numel() for parameter in model.parameters())
        return Deployed(
            backend=self,
            predict=network,
            save=lambda path: torch.save({"architecture": model.architecture, "state_dict": weights}, path),
            network=network.network,
            reference=reference,
            weight_modules=layers,
            quantized_modules=layers,
            parameters=numbers,
            quantized_parameters=numbers,
            weight_bytes=sum(value.numel() * value.element_size() for value in network.parameters()),
        )

    def training(self, recipe: dict) -> tuple[str, dict]:
        return "", {}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """`model` itself: autocast, which the recipe's `amp` asks for, is the rounding that it learns to live with."""
        return copy.deepcopy(model)

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        return self.quantize(trained.model, images, recipe)

    def load(self, path: Path, device: str) -> Predictor:
        content = torch.load(path, map_location="cpu", weights_only=True)
        network = self.wrapper(architectures.build(content["architecture"]))
        network.network.load_state_dict(content["state_dict"])
        return network.eval().to(device, memory_format=torch.channels_last)
