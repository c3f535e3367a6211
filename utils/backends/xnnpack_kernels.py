"""Counts of the kernels in an ExecuTorch program, read from its file."""

import collections
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils import layer_counts
from utils.backends import torch_export

LAYER_KERNELS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected")
TENSORS = ("input_id", "input1_id", "input2_id", "filter_id", "output_id")  # of a kernel
INTEGER_FORMATS = ("xnn_datatype_qint8", "xnn_datatype_qcint8")


def kernels(path: Path) -> dict:
    """Count the kernels and operators in the program at `path`, as it is written there.

    Besides the layers that XNNPACK computes, returns `integer` and `float`, {name of a kernel of
    XNNPACK: count}, by what it reads and writes, and `outside`, {name of an operator that
    ExecuTorch computes: count}.
    """
    with torch_export.quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        program = deserialize_pte_binary(path.read_bytes()).program
        plan = program.execution_plan[0]
        blobs = [
            program.backend_delegate_data[part.processed.index].data for part in plan.delegates
        ]
        graphs = [_graph(bytes(blob)) for blob in blobs]
    integer, floating = collections.Counter(), collections.Counter()
    for graph in graphs:
        for kernel, on_integers in _kernels_of(graph):
            (integer if on_integers else floating)[kernel] += 1
    on_integers = sum(integer[name] for name in LAYER_KERNELS)
    return layer_counts.counted(
        on_integers + sum(floating[name] for name in LAYER_KERNELS),
        on_integers,
        integer=dict(integer),
        float=dict(floating),
        outside=dict(collections.Counter(_operators_outside(plan))),
    )


def _kernels_of(graph: dict) -> Iterator[tuple[str, bool]]:
    """Yield each kernel's name in a graph, and whether all that it reads and writes is integers."""
    formats = []
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        formats.append(union.get("tensor_value", union)["datatype"])
    for node in graph["xnodes"]:
        union = node["xnode_union"]
        tensors = [formats[union[name]] for name in TENSORS if name in union]
        yield node["xnode_union_type"], all(format in INTEGER_FORMATS for format in tensors)


def _operators_outside(plan) -> Iterator[str]:
    """Yield the operator of each call in an execution plan, except calls of delegates."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            if hasattr(instruction.instr_args, "op_index"):
                yield plan.operators[instruction.instr_args.op_index].name


def _graph(blob: bytes) -> dict:
    """Return the graph that a delegate of XNNPACK holds, as the JSON of ExecuTorch's schema."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as serialization
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = serialization.XNNHeader.from_bytes(blob[: serialization.XNNHeader.EXPECTED_LENGTH])
    start, size = header.flatbuffer_offset, header.flatbuffer_size
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "schema.bin"
        schema.write_bytes(serialization._get_schema_bytes())
        binary.write_bytes(blob[start : start + size])
        _flatc_decompile(folder, str(schema), str(binary))
        text = (Path(folder) / "schema.json").read_text()
    return json.loads(re.sub(r"-?\binf\b", "null", text))  # JSON has no infinity
