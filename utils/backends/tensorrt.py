"""TensorRT on an NVIDIA GPU: FP32, FP16, and INT8 with the other operators in FP32 or FP16.

TensorRT compiles an ONNX graph to a *plan*, which runs only with the version and on the model of
GPU that it was built with. Its networks are strongly typed: the graph alone decides the number
format of every operator, and TensorRT chooses only how to compute it.
"""

import copy
import dataclasses
import functools
import importlib
import re
import tempfile
import textwrap
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

SMALLEST = 2.0**-24  # smallest positive FP16 number
BATCHES = (1, 32, 64)  # smallest batch of a plan, the one that its kernels are chosen for, largest
SIDE = 224


class TensorRT(Lowering):
    """The backend of TensorRT plans with all that is not quantized in the format `rest`.

    `package` is the Python package; "tensorrt_rtx" has the same API.
    """

    layout = torch.contiguous_format

    def __init__(self, name: str, rest: torch.dtype, package: str = "tensorrt"):
        self.name, self.rest, self.package = name, rest, package

    def problem(self) -> str | None:
        no_gpu = (
            None if torch.cuda.is_available() else "no NVIDIA GPU that this build of torch can use"
        )
        missing = not_installed("requirements-tensorrt.txt", self.package, "onnx", "onnxscript")
        return "; ".join(filter(None, (no_gpu, missing))) or None

    @property
    def suffix(self) -> str:
        """End of a plan's file name, with the GPU and the version that the plan is for."""
        if self.problem():
            return f".{self.name}.plan"
        built = self.built_with()
        return f".{self.name}.{re.sub('[^a-z0-9]+', '-', built['gpu'].lower()).strip('-')}.{built['tensorrt']}.plan"

    def built_with(self) -> dict[str, str]:
        """Return what a plan built here depends on: the GPU and the version of TensorRT."""
        return {
            "gpu": torch.cuda.get_device_name(),
            "tensorrt": importlib.import_module(self.package).__version__,
        }

    def default_config(self, bits: int) -> QDQConfig:
        """Return where TensorRT wants pairs: int8 around 0, and one scale for each activation."""
        return QDQConfig("inputs", activation=torch.int8, symmetric=True)

    def deploy(self, quantized: Quantized) -> Lowered:
        deployed = super().deploy(quantized)
        return dataclasses.replace(deployed, facts=deployed.facts | self.built_with())

    def lower(self, quantized: Quantized, path: Path) -> None:
        """Build the plan of a quantized network and write it to `path`.

        Its quantized layers run on integers. The others, `keep_fp32` among them, are in the format
        `rest`. Raises `UserError` if the graph breaks TensorRT's rules or TensorRT refuses it.
        """
        self._compile(
            quantized.network if self.rest is torch.float32 else half(quantized.network), path
        )

    def lower_half(self, network: nn.Module, path: Path) -> None:
        """Build the plan of a float `network`, all of it in the format `rest`; write it to `path`.

        Raises `UserError` if TensorRT refuses it.
        """
        self._compile(network if self.rest is torch.float32 else Half(network), path)

    def load(self, path: Path, device: str) -> Predictor:
        """Load a plan, or the FP32 checkpoint at `path`, whose FP32 plan is kept beside it.

        Raises `UserError` if the plan is another version's or another GPU's.
        """
        return Plan(self.package, self._fp32_plan(path) if path.suffix == ".pt" else path)

    def _fp32_plan(self, checkpoint: Path) -> Path:
        return checkpoints.derived(
            checkpoint,
            self.suffix,
            lambda target: self._write(onnx_export.of_checkpoint(checkpoint), target),
            ("utils.backends.tensorrt",),
            (self.package, *onnx_export.PACKAGES),
        )

    def _compile(self, network: nn.Module, path: Path) -> None:
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
                f"{self.name}: the graph breaks TensorRT's rules for quantization{more}: {broken[0]}."
            )
        plan = build(self.package, graph)
        with paths.atomic(path) as temporary:
            temporary.write_bytes(plan)


class Plan:
    """A plan in GPU memory, ready to run: from images to logits.

    Images are float32 (n, 3, 224, 224) CUDA tensors, normalised, with n from 1 to 64; logits are
    float32 (n, 2) CUDA tensors. A call returns at once; the caller's stream waits for the logits.
    """

    def __init__(self, package: str, path: Path):
        trt, self.log = _library(package)
        self.log.errors.clear()
        self.runtime = trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(
                f"{path}: TensorRT {trt.__version__} cannot load this plan here ({self.log.first()}). A plan runs only with the "
                "version and on the model of GPU that it was built with; delete it and run its script again."
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        # A shape is set when it changes only: that costs time, and is no part of a CUDA graph.
        changed = tuple(self.context.get_tensor_shape("images")) != tuple(x.shape)
        if changed and not self.context.set_input_shape("images", tuple(x.shape)):
            raise UserError(
                f"a plan takes {BATCHES[0]} to {BATCHES[-1]} images, not {len(x)}: give smaller --batch-sizes."
            )
        logits = torch.empty(len(x), NUM_CLASSES, device=x.device)
        self.context.set_tensor_address("images", x.data_ptr())
        self.context.set_tensor_address("logits", logits.data_ptr())
        caller = torch.cuda.current_stream(x.device)
        # On the default stream, TensorRT adds synchronizations. During a capture, the caller's
        # stream is the one captured, and not the default.
        stream = self.stream if caller == torch.cuda.default_stream(x.device) else caller
        stream.wait_stream(caller)
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT could not start the plan: {self.log.first()}")
        # From here on, the caller's stream is behind the plan: it may free or overwrite both tensors.
        caller.wait_stream(stream)
        return logits


class _OnnxQDQ(nn.Module):
    """A `QDQ` in FP16, as ONNX operators; it can be exported, but not run."""

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
    """A `QuantizedLayer` with FP16 scales and bias, as ONNX operators; it can only be exported."""

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self.layer = layer
        scale = _fp16(layer.scale)
        # The integers stay the same unless a scale is so small that FP16 holds few of its bits.
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
    """Copy the network of a `Quantized` for export, with all in FP16 that is not an integer.

    TensorRT computes a quantized layer on integers if its scales are in the format of what it reads
    and writes. PyTorch's operators give float32 only, hence the ONNX operators.
    """
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, QDQ):
            network.set_submodule(name, _OnnxQDQ(module))
        elif isinstance(module, QuantizedLayer):
            network.set_submodule(name, _Layer(module))
    return Half(network)


def _fp16(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to FP16; those that would become 0 get its smallest positive number."""
    return scale.half().clamp_min(SMALLEST)


def build(package: str, graph: Path) -> bytes:
    """Return the plan of the ONNX file `graph`, for the GPU of this machine.

    TF32, with 10 bits of mantissa, is off, so FP32 is FP32. Raises `UserError` with TensorRT's
    first message if it refuses the graph.
    """
    trt, log = _library(package)
    log.errors.clear()
    builder = trt.Builder(log)
    typed = getattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None
    )  # the only kind, once the flag is gone
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


@functools.cache
def _library(package: str):
    """Return TensorRT and its log; TensorRT keeps the first log it is given in a process."""
    trt = importlib.import_module(package)

    class Log(trt.ILogger):
        """The errors since `errors` was last cleared."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)

        def first(self) -> str:
            """Return the first error in one line."""
            return textwrap.shorten(self.errors[0], 300) if self.errors else "no reason given"

    return trt, Log()


ENGINES = {
    engine.name: engine
    for engine in (TensorRT("tensorrt", torch.float32), TensorRT("tensorrt_fp16", torch.float16))
}
