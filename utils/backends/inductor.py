"""FP32 and INT8 through Inductor, torch's compiler: packages of AOTInductor.

Inductor turns a quantized network into C++ and calls to oneDNN's integer kernels, and compiles it.
torchao tells it what to look for: a dequantization at each input of a convolution or linear layer.
The package, a .pt2 file, holds machine code and the weights as oneDNN arranges them for this
processor, so it runs only on processors with the same instruction set. The package of an FP32
network is made once from its checkpoint and kept next to it.
"""

import collections
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

from utils import architectures, environment, layer_counts
from utils.backends import clipping, torch_export
from utils.backends.base import Predictor
from utils.backends.lowering import Lowering, not_installed, u8s8_overflow
from utils.errors import UserError
from utils.quantize.modules import QDQ
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.training import checkpoints

# Its import registers torchao's fusions with Inductor.
FUSIONS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
# Calls of torch's kernels in the C++ of a package, and the names of layers among them.
CALL = re.compile(r"\baoti_torch_cpu_(\w+)\(")
INTEGER_LAYER_CALL = re.compile(r"_q(conv|linear)")
LAYER_CALL = re.compile(r"conv|linear|addmm|(^|_)mm")


class Inductor(Lowering):
    """The backend of quantized networks that Inductor compiles for the CPU."""

    name, suffix, layout = "inductor", ".inductor.pt2", torch.contiguous_format

    def problem(self) -> str | None:
        no_compiler = shutil.which(os.environ.get("CXX", "g++")) is None
        return not_installed("requirements-torchao.txt", "torchao") or (
            "Inductor needs a C++ compiler" if no_compiler else None
        )

    def default_config(self, bits: int) -> QDQConfig:
        """Return where Inductor wants Q/DQ pairs: as OpenVINO does, so both share one network.

        Rounded summands make ResNet-18 1.33 times as fast at batch 32. Inductor has no integer
        kernel for inputs with a scale for each channel: depthwise layers that read them compute in
        FP32 on rounded numbers.
        """
        return QDQConfig(
            "inputs",
            scales="needed",
            rounded_sums=True,
            centred=True,
            overflow=u8s8_overflow("onednn"),
        )

    def float_weights(self, quantized: Quantized) -> list[str]:
        return scaled_by_channel(quantized)

    def lower(self, quantized: Quantized, path: Path) -> None:
        """Compile `quantized` to a package at `path`, for any batch size and number of threads.

        oneDNN stores the weights in the order that suits one image and the number of threads that
        torch has now. With another number, or several images, it may want others and arranges them
        anew in every answer: for AlexNet's second convolution by a routine that is not optimized,
        which takes 18 of 25 ms with one thread after a compilation with two. Compiled with one
        thread, AlexNet takes 8 ms with one.

        That takes 15 (ResNet-18, AlexNet) to 33 s (MobileNetV3-Small) of processor time.
        """
        write(for_inductor(quantized), path)

    def load(self, path: Path, device: str) -> Predictor:
        """Load an artifact or an FP32 checkpoint, to run with the number of threads of torch."""
        from torch._inductor import aoti_load_package

        package = aoti_load_package(str(self._package(path)))
        # The code reads memory in order, and does not check strides.
        return lambda x: package(x.contiguous())

    def kernels(self, path: Path) -> dict:
        """Count the kernels in an artifact, or in the package of an FP32 checkpoint."""
        return kernels(self._package(path))

    def _package(self, path: Path) -> Path:
        """Return `path`, or the path of an FP32 checkpoint's package, which is made if missing."""
        if path.suffix != ".pt":
            return path

        def compile(target: Path) -> None:
            write(folded(architectures.rebuild(checkpoints.read(path))), target)

        # A folder of checkpoints may be shared by processors with other instruction sets.
        processor = checkpoints.fingerprint(cpu=environment.cpu())[:6]
        suffix = f".{processor}{self.suffix}"
        return checkpoints.derived(path, suffix, compile, (__name__,), ("torch", "torchao"))


def write(network: nn.Module, path: Path) -> None:
    """Compile `network`, float or in a form for Inductor, and write the package to `path`.

    Raises `UserError` if the C++ compiler fails.
    """
    from torch._inductor.exc import InductorError

    with torch_export.quiet(), torch.no_grad():
        importlib.import_module(FUSIONS)
        program = torch_export.program(network)
        try:
            package = compiled(program)
        except InductorError as error:
            if "CppCompileError" not in str(error):
                raise
            raise UserError(
                f"inductor: the C++ compiler failed ({_reason(error)}). "
                f"See that {tempfile.gettempdir()} has room, or take another --backend."
            ) from None
    path.write_bytes(package)


def compiled(program: torch.export.ExportedProgram) -> memoryview:
    """Return the package that Inductor compiles from an exported network."""
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.utils import fresh_cache

    # Without dynamic threads, the code would always use the number of threads of this process.
    settings = {"freezing": True, "cpp.dynamic_threads": True}
    package = io.BytesIO()  # given a path, torch's writer aborts the process if the disk is full
    with config.patch(settings), fresh_cache():  # the usual cache would keep every package
        aoti_compile_and_package(program, package_path=package)
    return package.getbuffer()


def _reason(error: Exception) -> str:
    """Return the last error of the C++ compiler."""
    for line in reversed(str(error).splitlines()):
        if "error" in line and "CppCompileError" not in line:
            return line.strip()
    return "it does not say why"


class FloatQDQ(nn.Module):
    """A `QDQ` with a scale for each channel of (n, channels, h, w), in float arithmetic.

    It gives the same numbers. Inductor does not vectorize the original, which would take 40 % of
    the time of MobileNetV3-Small.
    """

    def __init__(self, qdq: QDQ):
        super().__init__()
        low, high = qdq.limits
        self.register_buffer("scale", qdq.scale.view(1, -1, 1, 1))
        self.register_buffer("inverse", 1 / self.scale)  # torch's operators also multiply by it
        self.register_buffer("low", low - qdq.zero_point.float().view(1, -1, 1, 1))
        self.register_buffer("high", self.low + (high - low))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(x * self.inverse), self.low, self.high) * self.scale


def for_inductor(quantized: Quantized) -> fx.GraphModule:
    """Copy the network of `quantized` in a form that Inductor computes fast.

    Q/DQ pairs with a scale for each channel, and the depthwise convolutions that read them, get
    float arithmetic. The weights stay rounded.
    """
    network = clipping.clipped(quantized.network, clipping.Integers)
    for name in scaled_by_channel(quantized):
        layer, pair = quantized.layers[name], quantized.qdqs.reads[name]
        network.set_submodule(pair, FloatQDQ(quantized.qdq(pair)))
        network.set_submodule(name, layer.plain(layer.values(), layer.bias.clone()))
    return network


def scaled_by_channel(quantized: Quantized) -> list[str]:
    """Return the layers that read one scale per channel."""
    reads = quantized.qdqs.reads
    return [name for name in quantized.layers if quantized.qdq(reads[name]).numbers is None]


def kernels(path: Path) -> dict:
    """Count the layers that the C++ of a package calls, and their `kernels`, {name: count}."""
    with zipfile.ZipFile(path) as package:
        (wrapper,) = (name for name in package.namelist() if name.endswith(".wrapper.cpp"))
        calls = collections.Counter(CALL.findall(package.read(wrapper).decode()))
    layers = {name: count for name, count in calls.items() if LAYER_CALL.search(name)}
    integers = sum(count for name, count in layers.items() if INTEGER_LAYER_CALL.search(name))
    return layer_counts.counted(sum(layers.values()), integers, kernels=layers)


ENGINES = {"inductor": Inductor()}
