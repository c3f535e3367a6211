"""XNNPACK, through ExecuTorch: FP32 and INT8 on the processors of phones and PCs.

The artifact is an ExecuTorch program, a .pte file with a free batch size. XNNPACK computes on int8
wherever an operator stands between dequantizations and a quantization. So it wants a Q/DQ pair
after every operator, and rounds biases to 32 bits. It adds its int8 x int8 products in 32 bits on
every processor, so they need no narrower range.
"""

import collections
import copy
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn

from utils import architectures, paths
from utils.backends import torch_export, xnnpack_kernels
from utils.backends.base import Predictor
from utils.backends.lowering import Lowering, not_installed
from utils.backends.operator_times import Timed
from utils.backends.xnnpack_rules import violations
from utils.errors import UserError
from utils.quantize.decomposed_ops import OPS
from utils.quantize.modules import QDQ, QuantizedLayer
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.training import checkpoints

LARGEST_BATCH = 256  # larger ones run in parts. The file does not grow with it.
HALF_INTEGER = 127  # stands for 1/2 where hardsigmoid adds it
# Events of ExecuTorch that contain the events of operators.
OUTER_EVENTS = ("Method::execute", "DELEGATE_CALL", "OPERATOR_CALL")
FORMATS = {"INT8": r"\b(Q[SUC]8W?|[SUX]8)\b", "FP32": r"\b[FX]32\b"}  # in names of operators


class Xnnpack(Lowering):
    """The backend of XNNPACK on a CPU."""

    name, suffix, layout = "xnnpack", ".pte", torch.channels_last
    overflows = False

    def problem(self) -> str | None:
        return not_installed("requirements-executorch.txt", "executorch")

    def default_config(self, bits: int) -> QDQConfig:
        return QDQConfig("outputs", torch.int8, bias="int32", unit_gates=True)

    def lower(self, quantized: Quantized, path: Path) -> None:
        with torch_export.quiet():
            network = for_xnnpack(quantized.network)
            program = torch_export.program(network, LARGEST_BATCH, self.layout)
        if lines := violations(program):
            raise UserError(
                f"XNNPACK would refuse this network: {'; '.join(lines)}. "
                "Try other `ranges` in the recipe."
            )
        write(program, path)

    def load(self, path: Path, device: str) -> Predictor:
        """Load an artifact or an FP32 checkpoint, to run with the present number of threads."""
        with torch_export.quiet():
            program = runtime()._load_program(str(self._program(path)))
            method = program.load_method("forward")

        def predict(x: torch.Tensor, program=program) -> torch.Tensor:  # keeps the program alive
            if len(x) > LARGEST_BATCH:
                return torch.cat([predict(part) for part in x.split(LARGEST_BATCH)])
            return method([x.contiguous(memory_format=self.layout)])[0]

        return predict

    def kernels(self, path: Path) -> dict:
        """Count the kernels in an artifact, or in the program of an FP32 checkpoint."""
        return xnnpack_kernels.kernels(self._program(path))

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> list[Timed]:
        """Return the times of XNNPACK's operators, means of `runs` answers to `x`.

        `path` is an artifact or an FP32 checkpoint. ExecuTorch's ETDump has the times, in whole
        microseconds for each answer. Only the names of layers and of operators that move numbers
        say which format they compute in.
        """
        with torch_export.quiet(), tempfile.TemporaryDirectory() as folder:
            from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

            module = runtime()._load_for_executorch(str(self._program(path)), enable_etdump=True)
            parts = x.contiguous(memory_format=self.layout).split(LARGEST_BATCH)
            for part in parts * (1 + runs):
                module.forward([part])
            dump = Path(folder) / "times.etdp"
            module.write_etdump_result_to_file(str(dump), "")
            blocks = deserialize_from_etdump_flatcc(dump.read_bytes()).run_data
        answers = [block.events for block in blocks if block.name == "Execute"]
        sums: dict[str, float] = collections.Counter()
        for events in answers[len(parts) :]:  # the first answer warms up
            for event in (item.profile_event for item in events):
                if event is not None and event.name not in OUTER_EVENTS:
                    ms = (event.end_time - event.start_time) / 1e6 / runs
                    sums[event.delegate_debug_id_str or event.name] += ms
        return [
            Timed(name, name.rpartition(" #")[0] or name, format_of(name), ms)
            for name, ms in sums.items()
        ]

    def _program(self, path: Path) -> Path:
        """Return `path`, or the path of an FP32 checkpoint's program, which is made if missing."""
        if path.suffix != ".pt":
            return path

        def export(target: Path) -> None:
            network = for_xnnpack(folded(architectures.rebuild(checkpoints.read(path))))
            write(torch_export.program(network, LARGEST_BATCH, self.layout), target)

        return checkpoints.derived(path, self.suffix, export, (__name__,), ("torch", "executorch"))


def runtime():
    """Return ExecuTorch's native module, with as many threads in its pool as torch has now."""
    # `executorch.runtime` does the same, but imports the exporter first: 3 s in every process.
    from executorch.extension.pybindings import _C

    # The pool belongs to the process, and has a thread for every core until it is reset.
    _C._unsafe_reset_threadpool(torch.get_num_threads())
    return _C


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported network to `path` as an ExecuTorch program that XNNPACK runs."""
    with torch_export.quiet():
        # It imports ExecuTorch's exporter, which takes 3 s and prints.
        from utils.backends import xnnpack_program

        content = xnnpack_program.serialized(program)
    with paths.atomic(path) as temporary:
        temporary.write_bytes(content)


def format_of(operator: str) -> str:
    """Return the format in XNNPACK's name of an operator: "INT8", "FP32" or ""."""
    for format, pattern in FORMATS.items():
        if re.search(pattern, operator):
            return format
    return ""


class Pool(nn.Module):
    """Adaptive average pooling as XNNPACK has it: a mean over all positions, or nothing."""

    def __init__(self, pooling: nn.AdaptiveAvgPool2d):
        super().__init__()
        size = pooling.output_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[2:]) == self.size:
            return x
        if self.size == (1, 1):
            return x.mean((2, 3), keepdim=True)
        return F.adaptive_avg_pool2d(x, self.size)


class Flatten(nn.Module):
    """Flattening that infers only the batch size, as XNNPACK needs.

    Images that lie channel by channel in memory are reordered first. XNNPACK does so on integers
    only if the Q/DQ pair `qdq` follows.
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
    """Hardsigmoid of 6x: x plus 1/2, which the quantization after it clips to [0, 1].

    XNNPACK has no hardsigmoid, but it adds integers.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("middle", torch.full((1, 1, 1, 1), HALF_INTEGER, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + OPS.dequantize_per_tensor.default(
            self.middle, 0.5 / HALF_INTEGER, 0, -128, 127, torch.int8
        )


def for_xnnpack(network: fx.GraphModule) -> fx.GraphModule:
    """Copy a folded float or quantized `network` with operators in the forms that XNNPACK has."""
    network = copy.deepcopy(network)
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.AdaptiveAvgPool2d):
            network.set_submodule(node.target, Pool(module))
        elif isinstance(module, nn.Hardsigmoid):
            _fold_gate(network, node, modules)
        elif isinstance(module, nn.Flatten) or _flattens(node):
            _replace_flatten(network, node, modules)
    network.recompile()
    return network


def _flattens(node: fx.Node) -> bool:
    """Return whether a node calls torch's function or a tensor's method for flattening."""
    return node.target is torch.flatten or (node.op, node.target) == ("call_method", "flatten")


def _replace_flatten(network: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Put a `Flatten` in the place of `node`."""
    before = modules.get(node.args[0].target)
    name = f"{node.name}_in_form"
    network.add_submodule(name, Flatten(before if isinstance(before, QDQ) else None))
    with network.graph.inserting_before(node):
        node.replace_all_uses_with(network.graph.call_module(name, (node.args[0],)))
    network.graph.erase_node(node)


def _fold_gate(network: fx.GraphModule, gate: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Move the division of a hardsigmoid, clip(x / 6 + 1 / 2, 0, 1), into the layer before it.

    A float layer also adds the half, and XNNPACK clips its output at no cost. A quantized layer
    gets a sixth of its scales and its bias, so its integers stay the same. This changes the network
    in place.
    """
    before, after = modules.get(gate.args[0].target), modules.get(next(iter(gate.users)).target)
    if isinstance(before, nn.Conv2d | nn.Linear):
        if before.bias is not None and len(gate.args[0].users) == 1:
            before.weight.data = before.weight.data / 6
            before.bias.data = before.bias.data / 6 + 0.5
            network.set_submodule(gate.target, nn.Hardtanh(0.0, 1.0))
    elif isinstance(before, QDQ) and isinstance(after, QDQ) and before.numbers and after.numbers:
        node = gate.args[0].args[0]
        layer, (scale, zero_point) = modules.get(node.target), after.numbers
        alone = all(len(step.users) == 1 for step in (node, gate.args[0], gate))
        # After the gate, the lowest integer must stand for 0, and the highest for 1 at most.
        if alone and isinstance(layer, QuantizedLayer) and zero_point == -128 and scale * 255 <= 1:
            layer.scale, layer.bias = layer.scale / 6, layer.bias / 6
            before.assign(before.scale / 6, before.zero_point)
            network.set_submodule(gate.target, ShiftedGate())


ENGINES = {"xnnpack": Xnnpack()}
