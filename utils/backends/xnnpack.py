"""XNNPACK, through ExecuTorch: FP32 and INT8 on the processors of phones and PCs.

The artifact is an ExecuTorch program, a .pte file with a free batch size. XNNPACK computes on int8
wherever an operator stands between dequantizations and a quantization, so it wants a pair behind
every operator, and rounds biases to 32 bits. Its int8 x int8 products are added up in 32 bits on
every processor, so they need no narrower range.
"""

import collections
import copy
import json
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn

from utils import architectures, paths
from utils.backends import torch_export
from utils.backends.base import Predictor
from utils.backends.lowering import Lowering, not_installed
from utils.backends.operator_times import Timed
from utils.errors import UserError
from utils.quantize.decomposed_ops import OPS
from utils.quantize.modules import QDQ, QuantizedLayer
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.training import checkpoints

LARGEST = 256  # batch size; larger ones run in parts. The file does not grow with it.
STEPS = 256  # XNNPACK refuses a layer if a step of its products is this many steps of its output, or more
HALF = 127  # the integer that stands for 1/2 where hardsigmoid adds it
ATEN = torch.ops.aten
LAYERS = (ATEN.conv2d.default, ATEN.conv2d.padding, ATEN.linear.default)
MOVING = (ATEN.max_pool2d.default, ATEN.reshape.default, ATEN.view.default, ATEN.flatten.using_ints)
RELU = (ATEN.relu.default, ATEN.relu_.default)
ADD, MULTIPLY = (ATEN.add.Tensor, ATEN.add_.Tensor), (ATEN.mul.Tensor, ATEN.mul_.Tensor)
XNN_LAYERS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected")
ENDS = ("input_id", "input1_id", "input2_id", "filter_id", "output_id")  # tensors of an operator
AROUND = (
    "Method::execute",
    "DELEGATE_CALL",
    "OPERATOR_CALL",
)  # events that hold those of operators
INTEGERS = ("xnn_datatype_qint8", "xnn_datatype_qcint8")


class Xnnpack(Lowering):
    """The backend of XNNPACK on a CPU."""

    name, suffix, layout = "xnnpack", ".pte", torch.channels_last

    def problem(self) -> str | None:
        return not_installed("requirements-executorch.txt", "executorch")

    def default_config(self, bits: int) -> QDQConfig:
        return QDQConfig("outputs", torch.int8, bias="int32", unit_gates=True)

    def lower(self, quantized: Quantized, path: Path) -> None:
        with torch_export.quiet():
            program = torch_export.program(for_xnnpack(quantized.network), LARGEST, self.layout)
        if lines := violations(program):
            raise UserError(
                f"XNNPACK would refuse this network: {'; '.join(lines)}. Try another method for `activations`."
            )
        write(program, path)

    def load(self, path: Path, device: str) -> Predictor:
        """Load an artifact or an FP32 checkpoint, to run with the present number of threads."""
        with torch_export.quiet():
            program = runtime()._load_program(str(self._program(path)))
            method = program.load_method("forward")

        def predict(
            x: torch.Tensor, program=program
        ) -> torch.Tensor:  # a method needs its program alive
            if len(x) > LARGEST:
                return torch.cat([predict(part) for part in x.split(LARGEST)])
            return method([x.contiguous(memory_format=self.layout)])[0]

        return predict

    def kernels(self, path: Path) -> dict:
        """Count the kernels in an artifact or in the program of an FP32 checkpoint; see `kernels`."""
        return kernels(self._program(path))

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> list[Timed]:
        """Return the times of XNNPACK's operators in the artifact or FP32 checkpoint at `path`, means of `runs` answers to `x`.

        They are those of ExecuTorch's ETDump, in whole microseconds for each answer. Only the names of
        layers and of what moves numbers say which format they compute in.
        """
        with torch_export.quiet(), tempfile.TemporaryDirectory() as folder:
            from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

            module = runtime()._load_for_executorch(str(self._program(path)), enable_etdump=True)
            parts = x.contiguous(memory_format=self.layout).split(LARGEST)
            for part in parts * (1 + runs):
                module.forward([part])
            dump = Path(folder) / "times.etdp"
            module.write_etdump_result_to_file(str(dump), "")
            blocks = deserialize_from_etdump_flatcc(dump.read_bytes()).run_data
        answers = [block.events for block in blocks if block.name == "Execute"][
            len(parts) :
        ]  # the first one warms up
        sums: dict[str, float] = collections.Counter()
        for event in (each.profile_event for events in answers for each in events):
            if event is not None and event.name not in AROUND:
                sums[event.delegate_debug_id_str or event.name] += (
                    (event.end_time - event.start_time) / 1e6 / runs
                )
        return [
            Timed(name, name.rpartition(" #")[0] or name, format_of(name), ms)
            for name, ms in sums.items()
        ]

    def _program(self, path: Path) -> Path:
        """Return `path`, or, for an FP32 checkpoint, the path of its program; write that if it is missing."""
        if path.suffix != ".pt":
            return path

        def export(target: Path) -> None:
            network = for_xnnpack(folded(architectures.rebuild(checkpoints.read(path))))
            write(torch_export.program(network, LARGEST, self.layout), target)

        return checkpoints.derived(path, self.suffix, export)


def runtime():
    """Return ExecuTorch's native module, with a pool of as many threads as torch has at present."""
    # `executorch.runtime` does the same with it, but imports the exporter first: 3 s in every process.
    from executorch.extension.pybindings import _C

    # The pool has a thread for every core until it is reset, and belongs to the process.
    _C._unsafe_reset_threadpool(torch.get_num_threads())
    return _C


def format_of(operator: str) -> str:
    """Return the format that XNNPACK's name of an operator tells: "INT8", "FP32" or ""."""
    formats = {"INT8": r"\b(Q[SUC]8W?|[SUX]8)\b", "FP32": r"\b[FX]32\b"}
    return next((name for name, pattern in formats.items() if re.search(pattern, operator)), "")


class Pool(nn.Module):
    """Adaptive average pooling in the forms that XNNPACK has: a mean over all positions, or nothing."""

    def __init__(self, pooling: nn.AdaptiveAvgPool2d):
        super().__init__()
        size = pooling.output_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[2:]) == self.size:
            return x
        return (
            x.mean((2, 3), keepdim=True)
            if self.size == (1, 1)
            else F.adaptive_avg_pool2d(x, self.size)
        )


class Flatten(nn.Module):
    """Flattening with the batch size as the only dimension that is inferred, as XNNPACK needs.

    Images that lie channel by channel in memory are brought into order first. A pair behind that
    is needed for XNNPACK to do so with integers.
    """

    def __init__(self, qdq: nn.Module | None):
        super().__init__()
        self.qdq = qdq

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            x = x.to(memory_format=torch.contiguous_format)
            x = x if self.qdq is None else self.qdq(x)
        return x.reshape(-1, x[0].numel())


class ShiftedGate(nn.Module):
    """Hardsigmoid of 6x: the sum of x and 1/2, which the quantization behind it clips to [0, 1].

    XNNPACK has no hardsigmoid, but it adds integers.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("middle", torch.full((1, 1, 1, 1), HALF, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + OPS.dequantize_per_tensor.default(
            self.middle, 0.5 / HALF, 0, -128, 127, torch.int8
        )


def for_xnnpack(network: fx.GraphModule) -> fx.GraphModule:
    """Copy a folded float or quantized `network` with operators in the forms that XNNPACK has."""
    network = copy.deepcopy(network)
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.AdaptiveAvgPool2d):
            network.set_submodule(node.target, Pool(module))
        elif (
            isinstance(module, nn.Flatten)
            or node.target is torch.flatten
            or (node.op, node.target) == ("call_method", "flatten")
        ):
            before = modules.get(node.args[0].target)
            network.add_submodule(
                f"{node.name}_in_form", Flatten(before if isinstance(before, QDQ) else None)
            )
            with network.graph.inserting_before(node):
                node.replace_all_uses_with(
                    network.graph.call_module(f"{node.name}_in_form", (node.args[0],))
                )
            network.graph.erase_node(node)
        elif isinstance(module, nn.Hardsigmoid):
            _fold_gate(network, node, modules)
    network.recompile()
    return network


def _fold_gate(network: fx.GraphModule, gate: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Let a hardsigmoid, clip(x / 6 + 1 / 2, 0, 1), leave its division to the layer before it, in place.

    A float layer adds the half, too, and XNNPACK clips its output at no cost. A quantized layer
    gets a sixth of its scales and of its bias, so its integers remain the same.
    """
    before, after = modules.get(gate.args[0].target), modules.get(next(iter(gate.users)).target)
    if (
        isinstance(before, nn.Conv2d | nn.Linear)
        and before.bias is not None
        and len(gate.args[0].users) == 1
    ):
        before.weight.data, before.bias.data = before.weight.data / 6, before.bias.data / 6 + 0.5
        network.set_submodule(gate.target, nn.Hardtanh(0.0, 1.0))
    elif isinstance(before, QDQ) and isinstance(after, QDQ) and before.numbers and after.numbers:
        node = gate.args[0].args[0]
        layer, (scale, zero_point) = modules.get(node.target), after.numbers
        alone = all(len(each.users) == 1 for each in (node, gate.args[0], gate))
        # The lowest integer behind the gate must stand for 0, and the highest for 1 at most.
        if alone and isinstance(layer, QuantizedLayer) and zero_point == -128 and scale * 255 <= 1:
            layer.scale, layer.bias = layer.scale / 6, layer.bias / 6
            before.assign(before.scale / 6, before.zero_point)
            network.set_submodule(gate.target, ShiftedGate())


def violations(program: torch.export.ExportedProgram) -> list[str]:
    """Return what XNNPACK would refuse in an exported network, one line each; [] if nothing.

    It knows int8 with one scale for each tensor. A layer's step, input scale x weight scale, has to
    be under 256 steps of its output; XNNPACK refuses a file that breaks this, or in which pooling
    or flattening changes the numbers of its pair. The other bounds are those that XNNPACK asserts,
    which ends the process where it is built with assertions.
    """
    lines = []
    for node in program.graph.nodes:
        if node.target is OPS.quantize_per_channel.default:
            lines.append(
                f"{node.args[0].name} has a scale for each channel; XNNPACK wants one for each tensor"
            )
        elif node.target is OPS.quantize_per_tensor.default:
            lines += _of_qdq(program, node)
    return lines


def _of_qdq(program: torch.export.ExportedProgram, qdq: fx.Node) -> list[str]:
    """Return what XNNPACK would refuse about a quantization and the operator before it."""
    node, scale, zero_point, dtype = qdq.args[0], *qdq.args[1:3], qdq.args[5]
    if node.target in RELU:
        node = node.args[0]
    if dtype != torch.int8:
        return [
            f"{node.name} is quantized to {str(dtype).removeprefix('torch.')}; XNNPACK knows int8"
        ]
    if not torch.finfo(torch.float32).tiny <= scale < float("inf"):
        return [f"{node.name} has the scale {scale:g}, which is no normal number"]
    read = [
        each.args[1:3]
        for each in node.all_input_nodes
        if each.target is OPS.dequantize_per_tensor.default
    ]
    if node.target in MOVING and read and read[0] != (scale, zero_point):
        return [
            f"{node.name} changes scale and zero-point from {read[0]} to {(scale, zero_point)}; both must remain"
        ]
    name, ratios, low = node.name, [], 0.0
    if node.target in LAYERS and read and node.args[1].target is OPS.dequantize_per_channel.default:
        weight, weight_scale = (_tensor(program, each) for each in node.args[1].args[:2])
        name, ratios, low = weight[0], (read[0][0] * weight_scale[1] / scale).tolist(), 2.0**-32
    elif node.target in ADD and len(read) == 2:
        ratios, low = [each / scale for each, _ in read], 2.0**-10
    elif node.target in MULTIPLY and len(read) == 2:
        ratios, low = [read[0][0] * read[1][0] / scale], 2.0**-16
    wrong = [ratio for ratio in ratios if not low <= ratio < STEPS]
    return (
        [
            f"{name}: a step of its input is {wrong[0]:.4g} steps of its output, not {low:.1e} to {STEPS}"
        ]
        if wrong
        else []
    )


def _tensor(program: torch.export.ExportedProgram, node: fx.Node) -> tuple[str, torch.Tensor]:
    """Return the name and the value of the parameter or buffer that `node` stands for."""
    signature = program.graph_signature
    name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}[node.name]
    return name, (program.state_dict | program.constants)[name]


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported network to `path` as an ExecuTorch program that XNNPACK runs."""
    with torch_export.quiet():
        from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
        from executorch.backends.xnnpack.partition.config.generic_node_configs import (
            HardswishConfig,
        )
        from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        class IntegerHardswish(HardswishConfig):
            """Hardswish on integers, by a table of 256: XNNPACK has it, ExecuTorch does not ask for it."""

            def supported_precision_types(self):
                return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

        configs = [
            IntegerHardswish if each is HardswishConfig else each
            for each in ALL_PARTITIONER_CONFIGS
        ]
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner(configs=configs)]
        )
        # Memory for the input of the largest batch would be reserved at every batch size, and each input copied there.
        memory = MemoryPlanningPass(alloc_graph_input=False)
        content = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=memory)).buffer
    with paths.atomic(path) as temporary:
        temporary.write_bytes(content)


def kernels(path: Path) -> dict:
    """Count what computes in the program at `path`, as it is written there.

    Returns `layers`, the number of convolutions and linear layers that XNNPACK computes;
    `integer_layers`, how many of them multiply integers; `integer` and `float`, {name of a kernel
    of XNNPACK: count}, by what it reads and writes; `outside`, {name of an operator that
    ExecuTorch computes: count}.
    """
    with torch_export.quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        program = deserialize_pte_binary(path.read_bytes()).program
        plan = program.execution_plan[0]
        graphs = [
            _graph(bytes(program.backend_delegate_data[each.processed.index].data))
            for each in plan.delegates
        ]
    steps = [each.instr_args for chain in plan.chains for each in chain.instructions]
    calls = [plan.operators[each.op_index].name for each in steps if hasattr(each, "op_index")]
    counts = {True: collections.Counter(), False: collections.Counter()}
    for graph in graphs:
        types = [
            value["xvalue_union"].get("tensor_value", value["xvalue_union"])["datatype"]
            for value in graph["xvalues"]
        ]
        for node in graph["xnodes"]:
            ends = [types[node["xnode_union"][end]] for end in ENDS if end in node["xnode_union"]]
            counts[all(each in INTEGERS for each in ends)][node["xnode_union_type"]] += 1
    integer, floating = (dict(counts[kind]) for kind in (True, False))
    return {
        "layers": sum(each.get(name, 0) for each in (integer, floating) for name in XNN_LAYERS),
        "integer_layers": sum(integer.get(name, 0) for name in XNN_LAYERS),
        "integer": integer,
        "float": floating,
        "outside": dict(collections.Counter(calls)),
    }


def _graph(blob: bytes) -> dict:
    """Return the graph that a delegate of XNNPACK holds, as the JSON of ExecuTorch's schema."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as serialization
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = serialization.XNNHeader.from_bytes(blob[: serialization.XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "schema.bin"
        schema.write_bytes(serialization._get_schema_bytes())
        binary.write_bytes(
            blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
        )
        _flatc_decompile(folder, str(schema), str(binary))
        return json.loads(re.sub(r"-?\binf\b", "null", (Path(folder) / "schema.json").read_text()))


ENGINES = {"xnnpack": Xnnpack()}
