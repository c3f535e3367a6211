"""INT8 through Inductor, the compiler of torch: an AOTInductor package, made before it is loaded.

Inductor turns a quantized network into C++ and calls of oneDNN's integer kernels, and compiles it.
torchao knows what to look for: a dequantization at each input of a convolution or linear layer. The
package, a .pt2 file, holds the machine code with the weights as oneDNN arranges them for this
processor, so it is for processors of the same instruction set.
"""

import collections
import copy
import importlib
import io
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import fx, nn

from utils.backends import torch_export
from utils.backends.base import Predictor
from utils.backends.lowering import Lowering, not_installed, u8s8_overflow
from utils.errors import UserError
from utils.quantize.modules import QDQ, QuantizedLayer
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import INTEGERS, QDQConfig

FUSIONS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"  # importing it registers them with Inductor
CALL = re.compile(r"\baoti_torch_cpu_(\w+)\(")  # of a kernel of torch, in the C++ of a package
INTEGER_LAYERS = re.compile(r"_q(conv|linear)")
LAYERS = re.compile(r"conv|linear|addmm|(^|_)mm")


class Inductor(Lowering):
    """The backend of quantized networks that Inductor compiles for the CPU."""

    name, suffix, layout = "inductor", ".inductor.pt2", torch.contiguous_format

    def problem(self) -> str | None:
        no_compiler = shutil.which(os.environ.get("CXX", "g++")) is None
        return not_installed("requirements-torchao.txt", "torchao") or (
            "Inductor needs a C++ compiler" if no_compiler else None
        )

    def default_config(self, bits: int) -> QDQConfig:
        """Return where Inductor wants pairs: where OpenVINO does, so that both share one network.

        Rounded summands make ResNet-18 1.33 times as fast, at batch 32. Inductor has no integer
        kernel for inputs with a scale for each channel: depthwise layers whose inputs have these
        compute in FP32 on rounded numbers.
        """
        return QDQConfig(
            "inputs", scales="needed", rounded_sums=True, centred=True, overflow=u8s8_overflow()
        )

    def lower(self, quantized: Quantized, path: Path) -> None:
        """Compile `quantized` and write its package to `path`, for any batch size and number of threads.

        That takes 15 (ResNet-18, AlexNet) to 33 s (MobileNetV3-Small) of processor time.
        """
        from torch._inductor import aoti_compile_and_package, config
        from torch._inductor.exc import InductorError
        from torch._inductor.utils import fresh_cache

        importlib.import_module(FUSIONS)
        # Without dynamic threads, the code has the number of threads of this process for good.
        settings = {"freezing": True, "cpp.dynamic_threads": True}
        package = io.BytesIO()  # torch's writer of packages aborts the process where a disk is full
        with torch_export.quiet(), torch.no_grad():
            program = torch_export.program(for_inductor(quantized))
            try:
                with (
                    config.patch(settings),
                    fresh_cache(),
                ):  # the usual cache would keep a copy of every package
                    aoti_compile_and_package(program, package_path=package)
            except InductorError as error:
                if "CppCompileError" not in str(error):
                    raise
                reasons = [
                    line
                    for line in str(error).splitlines()
                    if "error" in line and "CppCompileError" not in line
                ]
                raise UserError(
                    f"inductor: the C++ compiler failed ({reasons[-1].strip() if reasons else 'it does not say why'}). "
                    f"See that {tempfile.gettempdir()} has room, or take another --backend."
                ) from None
        path.write_bytes(package.getbuffer())

    def load(self, path: Path, device: str) -> Predictor:
        """Load the package at `path`; it runs with the number of threads that torch has then."""
        from torch._inductor import aoti_load_package

        package = aoti_load_package(str(path))
        # The code takes memory as it lies, and checks nothing.
        return lambda x: package(x.contiguous())

    def kernels(self, path: Path) -> dict:
        """Count the kernels in the package at `path`; see `kernels`."""
        return kernels(path)


class FloatQDQ(nn.Module):
    """A `QDQ` with a scale for each channel of (n, channels, h, w), in float arithmetic.

    It gives the same numbers. Inductor does not vectorize the original, in which MobileNetV3-Small
    spends 40 % of its time.
    """

    def __init__(self, qdq: QDQ):
        super().__init__()
        low, high = INTEGERS[qdq.dtype]
        self.register_buffer("scale", qdq.scale.view(1, -1, 1, 1))
        self.register_buffer(
            "inverse", 1 / self.scale
        )  # the operators of torch multiply by it, too
        self.register_buffer("low", low - qdq.zero_point.float().view(1, -1, 1, 1))
        self.register_buffer("high", self.low + (high - low))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(x * self.inverse), self.low, self.high) * self.scale


def for_inductor(quantized: Quantized) -> fx.GraphModule:
    """Copy the network of `quantized`, with float arithmetic wherever a pair has a scale for each channel.

    Their layers are depthwise convolutions, which become float ones with the rounded weights.
    """
    network = copy.deepcopy(quantized.network)
    for name, layer in quantized.layers.items():
        qdq = quantized.qdq(quantized.qdqs.reads[name])
        if qdq.numbers is None:
            network.set_submodule(quantized.qdqs.reads[name], FloatQDQ(qdq))
            network.set_submodule(name, float_depthwise(layer))
    return network


def float_depthwise(layer: QuantizedLayer) -> nn.Conv2d:
    """Return a depthwise convolution in FP32 with the values of the integers of `layer`."""
    stride, padding, dilation, groups = layer.convolution
    convolution = nn.Conv2d(
        groups, groups, layer.weight.shape[2:], stride, padding, dilation, groups
    )
    convolution.weight.data, convolution.bias.data = layer.values(), layer.bias.clone()
    return convolution.eval()


def kernels(path: Path) -> dict:
    """Count the calls of kernels for convolutions and linear layers in the C++ of a package.

    Returns `layers`, their number; `integer_layers`, how many of them multiply integers; `kernels`,
    {name of a kernel: count}.
    """
    with zipfile.ZipFile(path) as package:
        (wrapper,) = (name for name in package.namelist() if name.endswith(".wrapper.cpp"))
        calls = collections.Counter(CALL.findall(package.read(wrapper).decode()))
    layers = {name: count for name, count in calls.items() if LAYERS.search(name)}
    integers = sum(count for name, count in layers.items() if INTEGER_LAYERS.search(name))
    return {"layers": sum(layers.values()), "integer_layers": integers, "kernels": layers}


ENGINES = {"inductor": Inductor()}
