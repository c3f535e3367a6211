"""OpenVINO on a CPU: FP32, INT8, and FP16 or BF16 where the CPU computes in them.

The artifact is an ONNX file, which OpenVINO compiles when it runs. An INT8 network has Q/DQ pairs
at the inputs of its convolutions and linear layers: OpenVINO computes these layers on integers, and
the rest in FP32.
"""

import collections
import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from utils import layer_counts, paths
from utils.backends import clipping, onnx_export
from utils.backends.base import Predictor
from utils.backends.lowering import Lowering, not_installed, u8s8_overflow
from utils.backends.operator_times import Timed
from utils.errors import UserError
from utils.quantize.modules import QDQ
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import QDQConfig

if TYPE_CHECKING:
    import openvino

# Types and precisions of nodes in OpenVINO's compiled graph.
LAYER_TYPES = ("Convolution", "FullyConnected", "MatMul")
IDLE_TYPES = ("Const", "Input", "Output", "Reorder", "Reshape")  # they compute nothing
INTEGER_PRECISIONS = ("u8", "i8")
FORMATS = {"i8": "INT8", "u8": "INT8", "f32": "FP32", "f16": "FP16", "bf16": "BF16"}


class OpenVino(Lowering):
    """The backend of OpenVINO, which computes in `precision` whatever is not quantized.

    `precision` is OpenVINO's name: f32, f16 or bf16.
    """

    layout = torch.contiguous_format

    def __init__(self, name: str, precision: str):
        self.name, self.precision, self.suffix = name, precision, f".{name}.onnx"

    def problem(self) -> str | None:
        missing = not_installed("requirements-openvino.txt", "openvino") or not_installed(
            "requirements.txt", "onnx", "onnxscript"
        )
        if missing:
            return missing
        label = FORMATS[self.precision]
        if label in _capabilities():
            return None
        return f"this CPU has no {label} arithmetic, so OpenVINO would compute in another"

    def default_config(self, bits: int) -> QDQConfig:
        """Return where OpenVINO wants Q/DQ pairs.

        Rounded summands make ResNet-18 1.15 times as fast at batch 32. Zero-points in the middle
        make MobileNetV3-Small 1.1 times as fast at any batch size.
        """
        return QDQConfig(
            "inputs",
            scales="needed",
            rounded_sums=True,
            centred=True,
            overflow=u8s8_overflow("onednn"),
        )

    def lower(self, quantized: Quantized, path: Path) -> None:
        network = clipping.clipped(quantized.network, clipping.Values)
        onnx_export.export(around_zero(network), path)

    def lower_half(self, network: nn.Module, path: Path) -> None:
        """Write a float `network` to `path`, with its weights in this backend's precision."""
        onnx_export.export(network, path)
        if self.precision != "f32":
            shorten(path, self.precision)

    def load(self, path: Path, device: str) -> Predictor:
        """Load an artifact or an FP32 checkpoint, to run with the present number of threads.

        The network is compiled again whenever the batch size changes: with a free batch size,
        MobileNetV3-Small is a fifth slower. Only the last compiled network is kept, so that the
        memory measured for one batch size does not include the others.
        """
        compile_for = functools.lru_cache(maxsize=1)(self._compiler(path))

        def predict(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(compile_for(len(x))(x.contiguous().numpy())[0])

        return predict

    def kernels(self, path: Path) -> dict:
        """Count the kernels that run the artifact at `path` for a batch of one."""
        return kernels(self._compiler(path)(1))

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> list[Timed]:
        """Return the times of the compiled graph's nodes, as OpenVINO measures them."""
        request = self._compiler(path, PERF_COUNT=True)(len(x)).create_infer_request()
        total, nodes = collections.Counter(), {}
        for run in range(runs + 1):
            request.infer([x.contiguous().numpy()])
            for node in request.get_profiling_info() if run else ():  # the first run is slower
                if node.status == node.Status.EXECUTED:
                    nodes[node.node_name] = node
                    total[node.node_name] += 1e3 * node.real_time.total_seconds()
        return [
            Timed(name, node.node_type, _format(node.exec_type), total[name] / runs)
            for name, node in nodes.items()
        ]

    def _compiler(self, path: Path, **changes):
        """Return a function that compiles the network at `path` for a batch size.

        `changes` are further settings of OpenVINO. The function raises `UserError` if OpenVINO
        would compute in another precision.
        """
        import openvino

        core = openvino.Core()
        model = core.read_model(onnx_export.of_checkpoint(path) if path.suffix == ".pt" else path)
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # the process that compares engines chooses their CPUs
        } | changes

        def compile_for(batch_size: int) -> "openvino.CompiledModel":
            model.reshape({0: [batch_size, *list(model.input(0).partial_shape)[1:]]})
            compiled = core.compile_model(model, "CPU", settings)
            actual = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            if actual != self.precision:
                raise UserError(
                    f"{self.name}: OpenVINO would compute in {actual} on this CPU, "
                    f"not in {self.precision}."
                )
            return compiled

        return compile_for


def around_zero(network: fx.GraphModule) -> fx.GraphModule:
    """Copy a quantized `network` with s8 and zero-point 0 in place of u8 and zero-point 128.

    The values are the same. OpenVINO multiplies s8 without a correction for the zero-point.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, QDQ) and module.numbers and module.numbers[1] == 128:
            module.dtype = torch.int8
            module.limits = tuple(limit - 128 for limit in module.limits)
            module.assign(module.scale, torch.tensor(0))
    return network


def kernels(compiled: "openvino.CompiledModel") -> dict:
    """Count the kernels of convolutions and linear layers in a compiled network.

    Besides the layers, returns `kernels`, {name of a kernel: count}, and `precisions`, {precision:
    count} of all other nodes that compute. In FP32 there can be fewer layers than in the network,
    because OpenVINO fuses some. With AVX-512, consecutive linear layers are a single node, a
    subgraph.
    """
    counts, precisions, integers = collections.Counter(), collections.Counter(), 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind, precision = _fact(node, "layerType"), _fact(node, "runtimePrecision")
        layers = []  # the precision of each
        if kind in LAYER_TYPES:
            layers = [precision]
        elif kind == "Subgraph":
            layers = _matrices(node)
        if layers:
            counts[_fact(node, "primitiveType")] += len(layers)
            integers += sum(layer in INTEGER_PRECISIONS for layer in layers)
        elif kind not in IDLE_TYPES:
            precisions[precision] += 1
    return layer_counts.counted(
        counts.total(), integers, kernels=dict(counts), precisions=dict(precisions)
    )


def _matrices(subgraph) -> list[str]:
    """Return the precision of each constant matrix that a node reads: weights of linear layers."""
    precisions = []
    for source in subgraph.inputs():
        node, shape = source.get_source_output().get_node(), source.get_partial_shape()
        is_constant = _fact(node, "layerType") == "Const"
        if is_constant and len(shape) == 2 and shape[0].get_length() > 1:
            precisions.append(_fact(node, "runtimePrecision"))
    return precisions


def _fact(node, name: str) -> str:
    return node.rt_info[name].astype(str)


def _format(kernel: str) -> str:
    """Return the format in the name of a kernel, for example "brgconv_avx512_I8"."""
    return FORMATS.get(kernel.lower().rpartition("_")[2], "")


def shorten(path: Path, precision: str) -> None:
    """Store the FP32 numbers of the ONNX file at `path` in `precision`, f16 or bf16, in place.

    The graph casts them back to FP32. OpenVINO then computes in the precision that it is given.
    """
    import ml_dtypes
    import numpy as np
    import onnx

    short = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[precision]
    model = onnx.load(path)
    casts = []
    for stored in model.graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT:
            name, values = stored.name, onnx.numpy_helper.to_array(stored).astype(short)
            stored.CopyFrom(onnx.numpy_helper.from_array(values, f"{name}_{precision}"))
            cast = onnx.helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT)
            casts.append(cast)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with paths.atomic(path) as temporary:
        onnx.save(model, temporary)


@functools.cache
def _capabilities() -> tuple[str, ...]:
    """Return the number formats that OpenVINO computes in on this CPU."""
    import openvino

    return tuple(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


ENGINES = {
    engine.name: engine
    for engine in (
        OpenVino("openvino", "f32"),
        OpenVino("openvino_fp16", "f16"),
        OpenVino("openvino_bf16", "bf16"),
    )
}
