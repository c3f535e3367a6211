"""The CPU provider of ONNX Runtime, for FP32, FP16 and quantized networks.

The graph of an FP32 network is exported once from its checkpoint and kept beside it. A quantized
network's graph is its artifact. ONNX Runtime looks for an operator between DequantizeLinear and
QuantizeLinear, so it wants pairs behind every operator, and rounds biases to 32 bits. FP16, which it
casts to FP32 wherever it has no kernel, and 16-bit integers gain nothing here.
"""

import collections
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from utils.backends import onnx_export
from utils.backends.base import Predictor
from utils.backends.fp16 import Half
from utils.backends.lowering import Lowering, not_installed, u8s8_overflow
from utils.backends.operator_times import Timed
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import QDQConfig


class OnnxRuntime(Lowering):
    """The backend of networks on the CPU provider of ONNX Runtime."""

    name, suffix, layout = "onnxruntime", ".onnx", torch.contiguous_format

    def problem(self) -> str | None:
        return not_installed("requirements.txt", "onnx", "onnxruntime", "onnxscript")

    def default_config(self, bits: int) -> QDQConfig:
        if bits == 16:
            # Its 16-bit operators are computed in FP32 between roundings: a second simulation.
            return QDQConfig(
                "outputs", torch.int16, torch.int8, bias="float", symmetric=True, steps=2**16 - 1
            )
        return QDQConfig(
            "outputs",
            bias="int32",
            overflow=u8s8_overflow(),
            pooling_keeps_scale=True,
            unit_gates=True,
            float_logits=True,
        )

    def lower(self, quantized: Quantized, path: Path) -> None:
        onnx_export.export(quantized.network, path)
        if quantized.config.bias == "int32":
            store_biases(quantized, path)

    def lower_half(self, network: nn.Module, path: Path) -> None:
        onnx_export.export(Half(network), path)

    def load(self, path: Path, device: str) -> Predictor:
        session = self.session(path)
        return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])

    def session(self, path: Path, optimized: Path | None = None, log: Path | None = None):
        """Load an artifact or an FP32 checkpoint.

        The optimized graph is written to `optimized`, and the times of all nodes to a file whose
        name begins with `log`, once `end_profiling` is called.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Without this, its threads keep spinning while the other side of a comparison is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if log is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(log)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.log_severity_level = (
                3  # it warns that the optimized graph is for this machine only
            )
        graph = onnx_export.of_checkpoint(path) if path.suffix == ".pt" else path
        # This one would quantize the weights of layers that stay in FP32, if they stand between pairs.
        disabled = ["WeightBiasQuantization"]
        return onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> list[Timed]:
        """Return the times of the nodes of the optimized graph, as ONNX Runtime logs them."""
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(path, log=Path(folder) / "profile")
            for _ in range(runs + 1):
                session.run(None, {"images": x.contiguous().numpy()})
            events = json.loads(Path(session.end_profiling()).read_text())
        nodes: dict[str, list[dict]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                nodes.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
        return [
            Timed(
                name,
                times[0]["args"]["op_name"],
                _format(times[0]),
                sum(each["dur"] for each in times[1:]) / 1e3 / runs,
            )
            for name, times in nodes.items()  # the first run is slower
        ]

    def kernels(self, path: Path) -> dict[str, int]:
        """Count the kernels of the optimized graph by operator, as ONNX Runtime runs them here."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self.session(path, optimized)
            graph = onnx.load(optimized).graph
        return dict(collections.Counter(node.op_type for node in graph.node))


def _format(event: dict) -> str:
    """Return the format that a node computes in: that of its first input."""
    first = next(
        (name for shape in event["args"].get("input_type_shape", []) for name in shape), ""
    )
    return {"uint8": "INT8", "int8": "INT8", "float": "FP32", "float16": "FP16"}.get(first, "")


def store_biases(quantized: Quantized, path: Path) -> None:
    """Replace the float biases in the graph at `path` by the 32-bit integers of `quantized`, in place.

    ONNX Runtime has integer kernels only for layers whose biases are dequantized integers.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    weights = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"
    }
    layers = {f"{name}.weight": name for name in quantized.layers}
    dequantizations = []
    for node in graph.node:
        name = layers.get(weights.get(node.input[1])) if node.op_type in ("Conv", "Gemm") else None
        if name is None or len(node.input) < 3:
            continue  # a layer that stays in FP32, or one whose biases are zeros
        layer, bias = quantized.layers[name], f"{name}.bias_dequantized"
        step = (quantized.input_scale(name).double() * layer.scale.double()).float()
        inputs = {f"{name}.bias_integers": layer.bias_integers, f"{name}.bias_scale": step}
        graph.initializer.extend(
            onnx.numpy_helper.from_array(value.numpy(), key) for key, value in inputs.items()
        )
        dequantizations.append(onnx.helper.make_node("DequantizeLinear", [*inputs], [bias], axis=0))
        node.input[2] = bias
    nodes = [*dequantizations, *graph.node]
    used = {name for node in nodes for name in node.input}
    stored = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, content in ((graph.node, nodes), (graph.initializer, stored)):
        del field[:]
        field.extend(content)
    onnx.save(model, path)


ENGINES = {"onnxruntime": OnnxRuntime()}
