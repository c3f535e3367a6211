"""TensorRT on an NVIDIA GPU: FP32, FP16, and INT8 with the other operators in FP32 or FP16.

TensorRT compiles an ONNX graph to a *plan*, which runs only with the version and on the model of
GPU that it was built with. Its networks are strongly typed: the graph alone decides the number
format of every operator, and TensorRT chooses only how to compute it. Its engine inspector names
fused nodes without the format of their products, so `kernels` does not say which layers run on
integers.
"""

import copy
import dataclasses
import functools
import importlib
import re
import tempfile
import textwrap
import types
from pathlib import Path

import torch
from torch import fx, nn

from utils import paths
from utils.architectures import NUM_CLASSES
from utils.backends import onnx_export
from utils.backends.base import Lowered, Predictor
from utils.backends.fp16 import Half
from utils.backends.lowering import Lowering, not_installed
from utils.errors import UserError
from utils.quantize.modules import QDQ, QuantizedLayer, by_output
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import QDQConfig
from utils.training import checkpoints

SMALLEST_FP16 = 2.0**-24  # above 0
# The smallest batch of a plan, the batch that its kernels are chosen for, and the largest.
BATCHES = (1, 32, 64)
SIDE = 224


class TensorRT(Lowering):
    """The backend of TensorRT plans; whatever is not quantized is in the format `rest`.

    `package` is the Python package; "tensorrt_rtx" has the same API.
    """

    layout = torch.contiguous_format
    overflows = False

    def __init__(self, name: str, rest: torch.dtype, package: str = "tensorrt"):
        self.name, self.rest, self.package = name, rest, package

    def problem(self) -> str | None:
        problems = []
        if not torch.cuda.is_available():
            problems.append("no NVIDIA GPU that this build of torch can use")
        if missing := not_installed(
            "requirements-tensorrt.txt", self.package, "onnx", "onnxscript"
        ):
            problems.append(missing)
        return "; ".join(problems) or None

    @property
    def suffix(self) -> str:
        """End of a plan's file name, with the GPU and the version that the plan is for."""
        if self.problem():
            return f".{self.name}.plan"
        built = self.built_with()
        gpu = re.sub("[^a-z0-9]+", "-", built["gpu"].lower()).strip("-")
        return f".{self.name}.{gpu}.{built['tensorrt']}.plan"

    def built_with(self) -> dict[str, str]:
        """Return what a plan built here depends on: the GPU and the version of TensorRT."""
        return {
            "gpu": torch.cuda.get_device_name(),
            "tensorrt": importlib.import_module(self.package).__version__,
        }

    def default_config(self, bits: int) -> QDQConfig:
        """Return where TensorRT wants Q/DQ pairs: int8 around 0, one scale for each activation."""
        return QDQConfig("inputs", activation=torch.int8, symmetric=True)

    def deploy(self, quantized: Quantized) -> Lowered:
        deployed = super().deploy(quantized)
        return dataclasses.replace(deployed, facts=deployed.facts | self.built_with())

    def lower(self, quantized: Quantized, path: Path) -> None:
        """Build the plan of a quantized network and write it to `path`.

        Quantized layers run on integers. All others, including `keep_fp32`, are in the format
        `rest`. Raises `UserError` if the graph breaks TensorRT's rules or TensorRT refuses it.
        """
        network = quantized.network
        self._compile(network if self.rest is torch.float32 else half(network), path)

    def lower_half(self, network: nn.Module, path: Path) -> None:
        """Build the plan of a float `network`, all of it in the format `rest`; write it to `path`.

        Raises `UserError` if TensorRT refuses it.
        """
        self._compile(network if self.rest is torch.float32 else Half(network), path)

    def load(self, path: Path, device: str) -> Predictor:
        """Load the plan at `path`, or for an FP32 checkpoint the plan that is kept next to it.

        Raises `UserError` if the plan is for another version or another GPU.
        """
        return Plan(self.package, self._fp32_plan(path) if path.suffix == ".pt" else path)

    def _fp32_plan(self, checkpoint: Path) -> Path:
        """Return the path of the plan of an FP32 checkpoint; build it if it is missing."""

        def write(target: Path) -> None:
            self._write(onnx_export.of_checkpoint(checkpoint), target)

        packages = (self.package, *onnx_export.PACKAGES)
        return checkpoints.derived(checkpoint, self.suffix, write, (__name__,), packages)

    def _compile(self, network: nn.Module, path: Path) -> None:
        """Write the plan of `network` to `path`."""
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "network.onnx"
            onnx_export.export(network, graph)
            self._write(graph, path)

    def _write(self, graph: Path, path: Path) -> None:
        """Write the plan of the ONNX file `graph` to `path`."""
        import onnx

        from utils.backends import tensorrt_rules

        if broken := tensorrt_rules.violations(onnx.load(graph)):
            more = f" ({len(broken) - 1} more)" if len(broken) > 1 else ""
            raise UserError(
                f"{self.name}: the graph breaks TensorRT's rules for quantization{more}: "
                f"{broken[0]}."
            )
        plan = build(self.package, graph)
        with paths.atomic(path) as temporary:
            temporary.write_bytes(plan)


class Plan:
    """A plan in GPU memory, ready to run: from images to logits.

    Images are float32 (n, 3, 224, 224) CUDA tensors, normalised, with n from 1 to 64. Logits are
    float32 (n, 2) CUDA tensors. A call returns at once; the caller's stream waits for the logits.
    """

    def __init__(self, package: str, path: Path):
        trt, self.log = _library(package)
        self.log.errors.clear()
        self.runtime = trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(
                f"{path}: TensorRT {trt.__version__} cannot load this plan here "
                f"({self.log.first()}). A plan runs only with the version and on the model of GPU "
                "that it was built with; delete it and run its script again."
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        # Setting a shape costs time and cannot be part of a CUDA graph.
        changed = tuple(self.context.get_tensor_shape("images")) != tuple(x.shape)
        if changed and not self.context.set_input_shape("images", tuple(x.shape)):
            raise UserError(
                f"a plan takes {BATCHES[0]} to {BATCHES[-1]} images, not {len(x)}: "
                "give smaller --batch-sizes."
            )
        logits = torch.empty(len(x), NUM_CLASSES, device=x.device)
        self.context.set_tensor_address("images", x.data_ptr())
        self.context.set_tensor_address("logits", logits.data_ptr())
        caller = torch.cuda.current_stream(x.device)
        # TensorRT adds synchronizations on the default stream. During a capture, the caller's
        # stream is the captured one, which is not the default.
        stream = self.stream if caller == torch.cuda.default_stream(x.device) else caller
        stream.wait_stream(caller)
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT could not start the plan: {self.log.first()}")
        # From now on, the caller's stream waits for the plan: both tensors may be overwritten.
        caller.wait_stream(stream)
        return logits


class _OnnxQDQ(nn.Module):
    """A `QDQ` in FP16, as ONNX operators; it can only be exported."""

    def __init__(self, qdq: QDQ):
        super().__init__()
        self.register_buffer("scale", _fp16(qdq.scale))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = (self.scale, self.zero_point)
        integers = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, *numbers), dtype=torch.int8, shape=x.shape
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (integers, *numbers), dtype=torch.float16, shape=x.shape
        )


class _Layer(nn.Module):
    """A `QuantizedLayer` with FP16 scales and bias, as ONNX operators, for export only."""

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self.layer = layer
        scale = _fp16(layer.scale)
        # The integers change only if a scale is so small that FP16 holds few of its bits.
        integers = torch.round(layer.values() / by_output(scale.float(), layer.weight))
        self.register_buffer("weight", integers.clamp(layer.low, layer.high).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = (self.weight, self.scale, self.zero_point)
        shape = self.weight.shape
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear", numbers, {"axis": 0}, dtype=torch.float16, shape=shape
        )
        return self.layer.compute(x, weight, self.layer.bias)


def half(network: fx.GraphModule) -> Half:
    """Copy the network of a `Quantized` for export, with FP16 in place of FP32.

    TensorRT computes a quantized layer on integers if its scales have the format of its input and
    output. PyTorch's operators only give float32, hence the ONNX operators.
    """
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, QDQ):
            network.set_submodule(name, _OnnxQDQ(module))
        elif isinstance(module, QuantizedLayer):
            network.set_submodule(name, _Layer(module))
    return Half(network)


def _fp16(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to FP16; scales that would become 0 get its smallest positive number."""
    return scale.half().clamp_min(SMALLEST_FP16)


def build(package: str, graph: Path) -> bytes:
    """Return the plan of the ONNX file `graph`, for the GPU of this machine.

    TF32, which has a mantissa of 10 bits, is off, so FP32 is FP32. Raises `UserError` with
    TensorRT's first message if it refuses the graph.
    """
    trt, log = _library(package)
    log.errors.clear()
    builder = trt.Builder(log)
    # A later version without the flag knows only strongly typed networks.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    plan = None
    if parser.parse(graph.read_bytes()):
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        profile = builder.create_optimization_profile()
        profile.set_shape("images", *((batch, 3, SIDE, SIDE) for batch in BATCHES))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        log.errors[:0] = [str(parser.get_error(position)) for position in range(parser.num_errors)]
        raise UserError(f"{package} {trt.__version__} refuses the network: {log.first()}")
    return bytes(plan)


class ErrorLog:
    """TensorRT's errors since `errors` was last cleared; a base of its logger."""

    def __init__(self):
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity, message: str) -> None:
        if severity in (self.Severity.INTERNAL_ERROR, self.Severity.ERROR):
            self.errors.append(message)

    def first(self) -> str:
        """Return the first error in one line."""
        return textwrap.shorten(self.errors[0], 300) if self.errors else "no reason given"


@functools.cache
def _library(package: str):
    """Return TensorRT and its log; in a process, TensorRT keeps the first log that it is given."""
    trt = importlib.import_module(package)
    # The other base comes from the package, which is imported only here and has two possible names.
    logger = types.new_class("Logger", (ErrorLog, trt.ILogger))
    return trt, logger()


ENGINES = {
    engine.name: engine
    for engine in (TensorRT("tensorrt", torch.float32), TensorRT("tensorrt_fp16", torch.float16))
}
