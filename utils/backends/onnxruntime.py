"""The CPU provider of ONNX Runtime, for FP32, FP16 and quantized networks.

The graph of an FP32 network is exported once from its checkpoint and kept next to it. The graph of
a quantized network is its artifact. ONNX Runtime looks for an operator between DequantizeLinear and
QuantizeLinear, so it wants a Q/DQ pair after every operator. It rounds biases to 32 bits. FP16 and
16-bit integers gain nothing here: where it has no kernel for FP16, it casts to FP32.
"""

import collections
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils import layer_counts
from utils.backends import clipping, onnx_export
from utils.backends.base import Predictor
from utils.backends.fp16 import Half
from utils.backends.lowering import Lowering, not_installed, u8s8_overflow
from utils.backends.operator_times import Timed
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import QDQConfig

# Types in ONNX Runtime's profile.
FORMATS = {"uint8": "INT8", "int8": "INT8", "float": "FP32", "float16": "FP16"}


class OnnxRuntime(Lowering):
    """The backend of networks on the CPU provider of ONNX Runtime."""

    name, suffix, layout = "onnxruntime", ".onnx", torch.contiguous_format

    def problem(self) -> str | None:
        return not_installed("requirements.txt", "onnx", "onnxruntime", "onnxscript")

    def default_config(self, bits: int) -> QDQConfig:
        if bits == 16:
            # It computes 16-bit operators in FP32 between roundings: a second simulation.
            return QDQConfig(
                "outputs", torch.int16, torch.int8, bias="float", symmetric=True, steps=2**16 - 1
            )
        return QDQConfig(
            "outputs",
            bias="int32",
            overflow=u8s8_overflow("mlas"),
            pooling_keeps_scale=True,
            unit_gates=True,
            float_logits=True,
        )

    def lower(self, quantized: Quantized, path: Path) -> None:
        network = clipping.clipped(quantized.network, clipping.Integers)
        onnx_export.export(network, path)
        if quantized.config.bias == "int32":
            on_integers(quantized, path)

    def lower_half(self, network: nn.Module, path: Path) -> None:
        onnx_export.export(Half(network), path)

    def load(self, path: Path, device: str) -> Predictor:
        session = self.session(path)
        return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])

    def session(self, path: Path, optimized: Path | None = None, log: Path | None = None):
        """Load an artifact or an FP32 checkpoint.

        If `optimized` is given, the optimized graph is written there. If `log` is given,
        `end_profiling` writes the times of all nodes to a file whose name begins with it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise, its threads would spin while the other side of a comparison is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if log is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(log)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.log_severity_level = 3  # it would warn that the graph is only for this machine
        graph = onnx_export.of_checkpoint(path) if path.suffix == ".pt" else path
        # This optimizer would quantize the weights of FP32 layers that stand between Q/DQ pairs.
        disabled = ["WeightBiasQuantization"]
        return onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> list[Timed]:
        """Return the times of the optimized graph's nodes, as ONNX Runtime logs them."""
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(path, log=Path(folder) / "profile")
            for _ in range(runs + 1):
                session.run(None, {"images": x.contiguous().numpy()})
            events = json.loads(Path(session.end_profiling()).read_text())
        nodes: dict[str, list[dict]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                nodes.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
        times = []
        for name, (first, *others) in nodes.items():  # the first run is slower
            ms = sum(event["dur"] for event in others) / 1e3 / runs
            times.append(Timed(name, first["args"]["op_name"], _format(first), ms))
        return times

    def kernels(self, path: Path) -> dict:
        """Count the layers and the `operators` of the graph, as ONNX Runtime optimizes it here."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self.session(path, optimized)
            graph = onnx.load(optimized).graph
        return layer_counts.of_onnx(collections.Counter(node.op_type for node in graph.node))


def _format(event: dict) -> str:
    """Return the format that a node computes in, by its first input; "" if it is another one."""
    types = [name for shape in event["args"].get("input_type_shape", []) for name in shape]
    return FORMATS.get(types[0], "") if types else ""


def on_integers(quantized: Quantized, path: Path) -> None:
    """Give the graph at `path` the forms that ONNX Runtime computes on integers, in place."""
    import onnx

    model = onnx.load(path)
    store_biases(quantized, model.graph)
    clip_integers(model.graph)
    onnx.save(model, path)


def store_biases(quantized: Quantized, graph) -> None:
    """Replace the float biases in an ONNX graph by the 32-bit integers of `quantized`.

    ONNX Runtime has integer kernels only for layers whose biases are dequantized integers.
    """
    import onnx

    dequantizations = []
    for node, name in _quantized_layers(graph, quantized):
        layer, bias = quantized.layers[name], f"{name}.bias_dequantized"
        step = (quantized.input_scale(name).double() * layer.scale.double()).float()
        inputs = {f"{name}.bias_integers": layer.bias_integers, f"{name}.bias_scale": step}
        for key, value in inputs.items():
            graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), key))
        dequantizations.append(onnx.helper.make_node("DequantizeLinear", [*inputs], [bias], axis=0))
        node.input[2] = bias
    nodes = [*dequantizations, *graph.node]
    used = {name for node in nodes for name in node.input}
    stored = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, content in ((graph.node, nodes), (graph.initializer, stored)):
        del field[:]
        field.extend(content)


def clip_integers(graph) -> None:
    """Compute every ReLU before a quantization on the integers instead, in place.

    The numbers stay equal.
    ONNX Runtime drops a ReLU before a quantization only if 0 becomes the lowest integer. Learned
    ranges may begin below 0: one to three layers of MobileNetV3-Small then stayed in FP32, fused
    with the ReLU. Clipping the integers at the zero-point does the same, after the integer layer.
    """
    import onnx

    numbers = {tensor.name: tensor for tensor in graph.initializer}
    readers = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    sources = {node.output[0]: node for node in graph.node if node.op_type == "Relu"}
    nodes, clipped = [], set()
    for node in graph.node:
        nodes.append(node)
        is_quantization = node.op_type == "QuantizeLinear" and len(node.input) > 2
        relu = sources.get(node.input[0]) if is_quantization else None
        if relu is None or len(readers[relu.output[0]]) > 1:
            continue
        zero_point = onnx.numpy_helper.to_array(numbers[node.input[2]])
        if (zero_point > np.iinfo(zero_point.dtype).min).any():
            output = node.output[0]
            node.input[0], node.output[0] = relu.input[0], f"{output}_with_negatives"
            nodes.append(onnx.helper.make_node("Clip", [node.output[0], node.input[2]], [output]))
            clipped.add(relu.output[0])
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in clipped)


def _quantized_layers(graph, quantized: Quantized) -> list[tuple]:
    """Return each node of a quantized layer with a bias, and the layer's name.

    Layers that stay in FP32 are left out, and layers whose biases are zeros.
    """
    weights = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"
    }
    layers = {f"{name}.weight": name for name in quantized.layers}
    nodes = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            name = layers.get(weights.get(node.input[1]))
            if name is not None:
                nodes.append((node, name))
    return nodes


ENGINES = {"onnxruntime": OnnxRuntime()}
