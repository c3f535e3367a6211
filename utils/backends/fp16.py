"""16-bit floats in PyTorch: everything in FP16 or BF16, or only where autocast casts.

`half` is the dissertation's "direct": `.half()`, with a file of half the size. `amp` keeps FP32
weights in the file and converts them in every run; softmax-like operations and sums stay in FP32
(torch.autocast). A processor without FP16 arithmetic emulates both, as slowly as a hundredth of its
FP32 speed. That speed is measured and tagged, never hidden. `bfloat16` and `amp_bf16` do the same
in BF16, which has the range of FP32 and 8 bits of precision. They run only on CPUs with BF16
arithmetic.
"""

import copy
import functools
from pathlib import Path

import torch
from torch import nn

from utils import architectures, environment, torch_file
from utils.backends import tf32
from utils.backends.base import (
    Backend,
    Converted,
    Floating,
    Predictor,
    float_layers,
    stored_parameters,
)
from utils.backends.operator_times import ByTorch
from utils.quantize import floating
from utils.recipes import Fp16QAT

NATIVE_CPU = {"avx512_fp16", "amx_fp16", "asimdhp"}
NATIVE_CUDA = (5, 3)  # the first compute capability with FP16 arithmetic
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's


def native(device: str) -> bool:
    """Return whether `device` has FP16 arithmetic in hardware."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= NATIVE_CUDA
    return bool(NATIVE_CPU & set(environment.cpu()[1]))


class Half(nn.Module):
    """A network in a 16-bit float format, with FP32 inputs and outputs."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float16):
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.to(self.dtype)).float()


class Autocast(nn.Module):
    """An FP32 network whose operators run in 16 bits where autocast considers it safe."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float16):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.network(x).float()


class Float16(ByTorch, Floating, Backend):
    """The backend of networks in `torch.float16` or `torch.bfloat16`."""

    layout, half = torch.channels_last, True

    def __init__(self, name: str, wrapper: type[nn.Module], dtype: torch.dtype):
        self.name, self.dtype, self.suffix = name, dtype, f".{name}.pt"
        self.format = {torch.float16: "FP16", torch.bfloat16: "BF16"}[dtype]
        self.wrapper = functools.partial(wrapper, dtype=dtype)
        # The largest FP16 number is 65,504; BF16 reaches as far as FP32.
        self.watched = dtype is torch.float16

    def problem(self) -> str | None:
        emulated = self.dtype is torch.bfloat16 and not NATIVE_BF16 & set(environment.cpu()[1])
        return "this CPU has no BF16 arithmetic" if emulated else None

    def deploy_half(self, model: nn.Module) -> Converted:
        """Convert a float `model` to this format."""
        fp32 = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        network = self.wrapper(copy.deepcopy(fp32))
        state = network.network.state_dict().items()
        weights = {key: value.detach().cpu().contiguous() for key, value in state}
        content = torch_file.packed({"architecture": model.architecture, "state_dict": weights})
        return Converted(
            backend=self,
            predict=network,
            save=lambda path: path.write_bytes(content),
            network=network.network,
            layers=float_layers(network.network),
            stored=stored_parameters(network.network),
            fp32=fp32,
        )

    def convert(self, trained: nn.Module, model: nn.Module, recipe: Fp16QAT) -> Converted:
        return self.deploy_half(floating.plain(trained, model))

    def load(self, path: Path, device: str) -> Predictor:
        tf32.forbid(device)  # autocast leaves some operators in FP32
        content = torch.load(path, map_location="cpu", weights_only=True)
        return (
            self.wrapper(architectures.rebuild(content))
            .eval()
            .to(device, memory_format=torch.channels_last)
        )


ENGINES = {
    engine.name: engine
    for engine in (
        Float16("half", Half, torch.float16),
        Float16("amp", Autocast, torch.float16),
        Float16("bfloat16", Half, torch.bfloat16),
        Float16("amp_bf16", Autocast, torch.bfloat16),
    )
}
