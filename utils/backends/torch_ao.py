"""INT8 on torch's four CPU engines: fbgemm, x86, onednn, qnnpack.

torch announces the removal of `torch.ao` and of the quantized formats, which these engines need.
Only this module depends on them. The artifact is the lowered graph as traced TorchScript: one file
with packed weights and all scales, which loads without the code that made it.
"""

import collections
import copy
import dataclasses
import functools
import io
import operator
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.ao's deprecation; `say_deprecated` tells the user
    from torch.ao.nn import quantized as nnq
    from torch.ao.nn.intrinsic import quantized as nniq
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

from utils import layer_counts, progress
from utils.backends.base import Lowered, Predictor
from utils.backends.lowering import Lowering, stored, u8s8_overflow
from utils.backends.operator_times import ByTorch
from utils.quantize.modules import QDQ, QuantizedLayer
from utils.quantize.network import Quantized
from utils.quantize.operators import ADDITIONS, Graph
from utils.quantize.qdq_config import INTEGERS, QDQConfig

# Operators of TorchScript that are convolutions and linear layers.
LAYER = re.compile(r"::(_?conv|linear|addmm|matmul)")
QUANTIZED_OPS = torch.ops.quantized
PRODUCTS = (operator.mul, torch.mul)
# The libraries whose kernels add products of an engine in 16 bits without VNNI.
LIBRARIES = {
    "fbgemm": ("fbgemm",),
    "x86": ("fbgemm", "onednn"),
    "onednn": ("onednn",),
    "qnnpack": (),
}
GATE = (1 / 256, 0)  # scale and zero-point of quantized hardsigmoid


class TorchAO(ByTorch, Lowering):
    """The backend of one of torch's quantized engines, on the CPU only."""

    suffix = ".torchscript"
    layout = torch.channels_last

    def __init__(self, name: str):
        self.name, self.overflows = name, name != "qnnpack"

    def problem(self) -> str | None:
        supported = torch.backends.quantized.supported_engines
        if self.name in supported:
            return None
        return f"this build of torch has only {', '.join(supported)}"

    def default_config(self, bits: int) -> QDQConfig:
        """Return where this engine wants Q/DQ pairs on this machine.

        qnnpack computes in 16 x 16 bits and never overflows. fbgemm's depthwise kernels add pairs
        of products in 16 bits even with VNNI: with 8-bit weights, MobileNetV3-Small on fbgemm was
        at 15.4 dB from exact execution, on photographs.
        """
        overflow = u8s8_overflow(*LIBRARIES[self.name])
        if self.name == "fbgemm" and overflow == "none":
            overflow = "depthwise"
        # In torch, an average has the scale of its input, and hardsigmoid's is fixed.
        return QDQConfig("outputs", overflow=overflow, pooling_keeps_scale=True, unit_gates=True)

    def lower(self, quantized: Quantized, path: Path) -> None:
        self.save(self.integers(quantized), path)

    def deploy(self, quantized: Quantized) -> Lowered:
        network = self.integers(quantized)
        lacking = network.meta["lacking"]
        if lacking:
            progress.say(
                f"{self.name} has no integer operator, only FP32, for {', '.join(lacking)}"
            )
        deployed = super().deploy(quantized)
        return dataclasses.replace(
            deployed,
            save=lambda path: self.save(network, path),
            predict=network,
            network=network,
            stored=stored(quantized, lacking),
            facts=deployed.facts | {"not_on_integers": lacking},
        )

    def integers(self, quantized: Quantized) -> fx.GraphModule:
        """Return the network of `quantized` with this engine's operators.

        Its `meta["lacking"]` names the operators that compute in FP32 because the engine has no
        integer operator for them. Modules that the recipe keeps in FP32 are not among them.
        """
        say_deprecated()
        torch.backends.quantized.engine = self.name  # packs weights for this engine
        return _Integers(quantized).lowered()

    def save(self, network: fx.GraphModule, path: Path) -> None:
        """Write what `integers` returned to `path`."""
        torch.backends.quantized.engine = self.name  # tracing runs the network
        path.write_bytes(torchscript(network))

    def load(self, path: Path, device: str) -> Predictor:
        torch.backends.quantized.engine = self.name  # loading packs weights for this engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location=device).eval()

    def kernels(self, path: Path) -> dict:
        """Count the layers in the TorchScript at `path`, and its `operators`, {name: count}."""
        nodes = self.load(path, "cpu").inlined_graph.nodes()
        operators = collections.Counter(node.kind() for node in nodes)
        operators = {name: count for name, count in operators.items() if "prim::" not in name}
        layers = {name: count for name, count in operators.items() if LAYER.search(name)}
        integers = sum(count for name, count in layers.items() if name.startswith("quantized::"))
        return layer_counts.counted(sum(layers.values()), integers, operators=operators)


def trace(network: fx.GraphModule) -> torch.jit.ScriptModule:
    """Return `network` as frozen TorchScript."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript's deprecation
        return torch.jit.freeze(torch.jit.trace(network.eval(), torch.zeros(2, 3, 224, 224)))


def torchscript(network: fx.GraphModule) -> memoryview:
    """Return `network` as the bytes of a TorchScript file; see `torch_file.packed`."""
    buffer = io.BytesIO()
    torch.jit.save(trace(network), buffer)
    return buffer.getbuffer()


def save_default(engine: str, model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Quantize a float `model` by torch's default for `engine`; write TorchScript to `path`.

    `images`, float32 (n, 3, 224, 224) normalised, are for calibration. The model is not changed.
    """
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.ao's deprecation
        example = torch.zeros(1, 3, 224, 224)
        mapping = get_default_qconfig_mapping(engine)
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model).eval(), mapping, (example,))
        for batch in images.split(16):
            prepared(batch)
        path.write_bytes(torchscript(quantize_fx.convert_fx(prepared)))


@functools.cache
def say_deprecated() -> None:
    """Tell the user, once in a process, that a future torch will not run these engines."""
    progress.say(
        "torch will remove quint8, the number format of fbgemm, x86, onednn and qnnpack "
        "(pytorch/pytorch#184982). Their files will not run with later versions: keep this version "
        "of torch for them, or take another --backend."
    )


class _Integers:
    """Lowering of one graph: nodes between Q/DQ pairs become quantized operators."""

    def __init__(self, quantized: Quantized):
        self.network, self.keep_fp32 = quantized.network, quantized.keep_fp32
        self.graph = fx.Graph()
        self.parts = nn.ModuleDict()
        self.new: dict[fx.Node, fx.Node] = {}  # old node -> its node in the new graph
        # Old node -> its scale and zero-point, if its new node is a quantized tensor.
        self.numbers: dict[fx.Node, tuple] = {}
        self.lacking: list[str] = []

    def lowered(self) -> fx.GraphModule:
        """Return the lowered graph."""
        for node in self.network.graph.nodes:
            if node not in self.new:
                self._lower(node)
        root = nn.Module()
        for name, part in self.parts.items():
            root.add_module(name, part)
        network = fx.GraphModule(root, self.graph).eval()
        network.meta["lacking"] = self.lacking
        return network

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(node.target) if node.op == "call_module" else None

    def _lower(self, node: fx.Node) -> None:
        module = self._module(node)
        if isinstance(module, QDQ):
            self._quantize(node, module)
        elif node.op == "output":
            self.graph.output(self._float(node.args[0]))
        elif (nodes := self._end(node)) and (new := self._computed(node, nodes)) is not None:
            self.new |= dict.fromkeys(nodes, new)
            self.numbers |= dict.fromkeys(nodes, self._module(nodes[-1]).numbers)
        else:
            if nodes and node.op != "placeholder" and not Graph.inside(node, self.keep_fp32):
                self.lacking.append(node.target if module is not None else node.name)
            if module is not None:
                self._add(node.name, module)
            new = self.graph.node_copy(node, self._float)
            new.target = node.name if module is not None else node.target
            self.new[node] = new

    def _float(self, node: fx.Node) -> fx.Node:
        """Return the new node that holds the values of `node` in FP32."""
        new = self.new[node]
        return self.graph.call_method("dequantize", (new,)) if node in self.numbers else new

    def _end(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the nodes of a computation up to its Q/DQ pair: operator, perhaps ReLU, pair.

        Returns None if it does not end in a pair.
        """
        nodes = [node]
        while len(nodes[-1].users) == 1 and len(nodes) < 3:
            nodes.append(next(iter(nodes[-1].users)))
            if isinstance(self._module(nodes[-1]), QDQ):
                return nodes
            if not isinstance(self._module(nodes[-1]), nn.ReLU):
                break
        return None

    def _quantize(self, node: fx.Node, qdq: QDQ) -> None:
        source = node.args[0]
        if self.numbers.get(source) == qdq.numbers:  # an equal pair once more
            self.new[node] = self.new[source]
        else:
            arguments = (self._float(source), *qdq.numbers, torch.quint8)
            new = self.graph.call_function(torch.quantize_per_tensor, arguments)
            self.new[node] = self._clipped(new, qdq)
        self.numbers[node] = qdq.numbers

    def _computed(self, node: fx.Node, nodes: list[fx.Node]) -> fx.Node | None:
        """Add the engine's operator for `nodes`, which `_end` returned.

        Returns None if the engine has none for these inputs and scales. They stay in FP32 then.
        """
        module, relu, qdq = self._module(node), len(nodes) == 3, self._module(nodes[-1])
        if not node.args or node.args[0] not in self.numbers:
            return None
        x = self.new[node.args[0]]
        if isinstance(module, QuantizedLayer):
            return self._clipped(self._called(node.name, packed(module, relu, qdq), x), qdq)
        if isinstance(module, nn.Hardswish) and not relu:
            new = self.graph.call_function(QUANTIZED_OPS.hardswish, (x, *qdq.numbers))
            return self._clipped(new, qdq)
        if isinstance(module, nn.Hardsigmoid) and qdq.numbers == GATE:
            return self.graph.call_function(F.hardsigmoid, (x,))
        combines = node.target in ADDITIONS + PRODUCTS and not node.kwargs
        if combines and all(operand in self.numbers for operand in node.args):
            return self._combined(node, relu, qdq)
        if not relu and qdq.numbers == self.numbers[node.args[0]]:
            return self._kept(node, qdq)
        return None

    def _combined(self, node: fx.Node, relu: bool, qdq: QDQ) -> fx.Node:
        """Add the engine's sum or product for `node`."""
        name = "add" if node.target in ADDITIONS else "mul"
        function = getattr(QUANTIZED_OPS, f"{name}_relu" if relu else name)
        operands = [self.new[operand] for operand in node.args]
        return self._clipped(self.graph.call_function(function, (*operands, *qdq.numbers)), qdq)

    def _clipped(self, new: fx.Node, qdq: QDQ) -> fx.Node:
        """Clip a quantized tensor to the limits of `qdq`: the operators clip it to 0 and 255."""
        if qdq.limits == INTEGERS[qdq.dtype]:
            return new
        scale, zero_point = qdq.numbers
        ends = [scale * (limit - zero_point) for limit in qdq.limits]
        return self.graph.call_function(torch.clamp, (new, *ends))

    def _kept(self, node: fx.Node, qdq: QDQ) -> fx.Node | None:
        """Add the engine's operator for `node` if it is one that keeps the scale of its input."""
        module, x = self._module(node), self.new[node.args[0]]
        if isinstance(module, nn.ReLU6):
            scale, zero_point = qdq.numbers
            stands_for_0_to_6 = zero_point == 0 and 255 * scale <= 6 * (1 + 1e-6)
            return x if stands_for_0_to_6 else self._called(node.name, nnq.ReLU6(), x)
        if isinstance(module, nn.AdaptiveAvgPool2d | nn.MaxPool2d | nn.Flatten):
            return self._called(node.name, module, x)
        if node.op == "call_method" or node.target is torch.flatten:
            return self.graph.node_copy(node, self.new.__getitem__)
        return None

    def _called(self, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
        self._add(name, module)
        return self.graph.call_module(name, (x,))

    def _add(self, name: str, module: nn.Module) -> None:
        self.parts[name] = module


def packed(layer: QuantizedLayer, relu: bool, qdq: QDQ) -> nn.Module:
    """Return a layer, with its ReLU if `relu`, as torch's module of packed weights.

    Its output has the numbers of `qdq`.
    """
    scales = layer.scale.double(), layer.zero_point
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation of quantized formats
        weight = torch._make_per_channel_quantized_tensor(layer.weight, *scales, 0)
    out, inputs = layer.weight.shape[:2]
    if layer.convolution is None:
        module = (nniq.LinearReLU if relu else nnq.Linear)(inputs, out)
    else:
        stride, padding, dilation, groups = layer.convolution
        how = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        module = (nniq.ConvReLU2d if relu else nnq.Conv2d)(
            inputs * groups, out, layer.weight.shape[2:], **how
        )
    module.set_weight_bias(weight, layer.bias)
    module.scale, module.zero_point = qdq.numbers
    return module


ENGINES = {name: TorchAO(name) for name in ("fbgemm", "x86", "onednn", "qnnpack")}
