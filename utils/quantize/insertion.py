"""Insert Q/DQ pairs into a network where a configuration asks for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from utils.errors import UserError
from utils.quantize.operators import ADDITIONS, IDLE, Graph, Kind
from utils.quantize.qdq_config import INTEGERS, QDQConfig

# Other moving operators give a size, or do nothing.
RESHAPING = (torch.flatten, "flatten", "view", "reshape", "contiguous")


@dataclass
class Inserted:
    """The Q/DQ pairs of a graph by name, and their neighbours."""

    reads: dict[str, str]  # quantized convolution or linear layer -> the pair that it reads
    source: dict[str, str]  # pair -> the module or node whose output it quantizes: "x", "add", ...
    channelwise: set[str]  # pairs with one scale per channel
    same_as: dict[str, str]  # pair of an average -> the pair whose scale it has
    gates: set[str]  # pairs of hardsigmoids
    useful: dict[str, tuple[torch.Tensor, torch.Tensor] | None]  # pair -> see `Graph.useful`


def insert(
    network: fx.GraphModule,
    config: QDQConfig,
    keep_fp32: tuple[str, ...],
    make: Callable[[tuple[int, int]], nn.Module],
    equalized: frozenset[str] = frozenset(),
) -> Inserted:
    """Insert a module `make(limits)` at every place of a Q/DQ pair in `network`, in place.

    `limits` are the lowest and the highest integer of the pair. Operators inside the modules
    `keep_fp32` are not quantized. Operators computed together, such as a convolution with its
    BatchNorm and ReLU, share a pair. It is named after the first operator, so its name does not
    depend on folding. One scale is enough for the inputs of the depthwise convolutions `equalized`.
    Raises `UserError` for an unknown operator, and for a quantized layer that is called on several
    tensors.
    """
    graph = Graph(network)
    places = _places(graph, config, keep_fp32)
    firsts = {node: graph.first(node) for node in places}  # before pairs separate them
    inserted = Inserted({}, {}, set(), {}, set(), {})
    carried: dict[fx.Node, str] = {}  # tensor -> the pair whose values it holds
    for node in graph.nodes:
        moved = _moved(graph, node, carried)
        if node in places:
            first = firsts[node]
            name = f"qdq_{first.name}"
            inserted.source[name] = first.target if first.op == "call_module" else first.name
            limits = config.limits
            if _is_gate(graph, node, places[node], config):
                inserted.gates.add(name)
                limits = INTEGERS[config.activation]
            if _needs_channels(graph, node, places[node], config, equalized):
                inserted.channelwise.add(name)
            inserted.useful[name] = graph.useful(graph.readers(places[node]))
            averages = graph.kinds[node] is Kind.AVERAGING
            if averages and config.pooling_keeps_scale and node.args[0] in carried:
                inserted.same_as[name] = carried[node.args[0]]
            network.add_submodule(name, make(limits))
            carried[_call(network, node, name, places[node])] = name
        elif moved:
            # Repeating the pair changes no value, but it tells an engine that the operator may
            # compute on integers.
            carried[_call(network, node, moved, list(node.users))] = moved
        elif isinstance(graph.module(node), IDLE) and node.args[0] in carried:
            carried[node] = carried[node.args[0]]
        if graph.kinds[node] is Kind.LAYER and not graph.inside(node, keep_fp32):
            qdq = carried[node.args[0]]
            if inserted.reads.setdefault(node.target, qdq) != qdq:
                raise UserError(
                    f"{node.target} reads tensors of different scales. Keep it in FP32 with "
                    "`keep_fp32` of the recipe."
                )
    network.recompile()
    return inserted


def _places(
    graph: Graph, config: QDQConfig, keep_fp32: tuple[str, ...]
) -> dict[fx.Node, list[fx.Node]]:
    """Return the tensors that get a pair, each with the operators that read it."""
    if config.position == "inputs":
        places = _inputs(graph, keep_fp32, config.rounded_sums)
    else:
        places = _outputs(graph, keep_fp32)
    if config.float_logits:
        logits = [node for node, users in places.items() if _are_outputs(graph, users)]
        places = {node: users for node, users in places.items() if node not in logits}
    return places


def _are_outputs(graph: Graph, users: list[fx.Node]) -> bool:
    return {graph.kinds[user] for user in users} == {Kind.OUTPUT}


def _inputs(graph: Graph, keep_fp32: tuple[str, ...], sums: bool) -> dict[fx.Node, list[fx.Node]]:
    """Return the tensors that quantized layers read, each with these readers.

    If `sums` is set, this includes the tensors that additions read. Max pooling gives the same
    numbers whether its input or its output is rounded. Engines are faster on integers, so its input
    is rounded.
    """
    places: dict[fx.Node, list[fx.Node]] = {}
    for reader in graph.nodes:
        is_sum = sums and reader.target in ADDITIONS
        if graph.inside(reader, keep_fp32) or not (is_sum or graph.kinds[reader] is Kind.LAYER):
            continue
        inputs = reader.all_input_nodes if is_sum else reader.args[:1]
        for node in inputs:
            user = reader
            while isinstance(graph.module(node), nn.MaxPool2d):
                user, node = node, node.args[0]
            readers = places.setdefault(node, [])
            if user not in readers:
                readers.append(user)
    return places


def _outputs(graph: Graph, keep_fp32: tuple[str, ...]) -> dict[fx.Node, list[fx.Node]]:
    """Return the inputs and outputs of all quantized operators, each with its users."""

    def quantized(node: fx.Node) -> bool:
        is_operator = graph.kinds[node] not in (Kind.INPUT, Kind.OUTPUT)
        return is_operator and not graph.inside(node, keep_fp32)

    places = {}
    for node in graph.nodes:
        if not graph.computes(node) or graph.followed(node) is not None:
            continue
        if quantized(graph.first(node)) or any(map(quantized, graph.readers(node.users))):
            places[node] = list(node.users)
    return places


def _moved(graph: Graph, node: fx.Node, carried: dict[fx.Node, str]) -> str | None:
    """Return the pair whose values the tensor `node` moves or selects, or None."""
    if graph.kinds[node] is not Kind.MOVING:
        return None
    if isinstance(graph.module(node), nn.MaxPool2d | nn.Flatten) or node.target in RESHAPING:
        return carried.get(node.args[0])
    return None


def _is_gate(graph: Graph, node: fx.Node, users: list[fx.Node], config: QDQConfig) -> bool:
    """Return whether `node`, which `users` read, is a hardsigmoid with the scale 1/256.

    Its integers have 8 bits, so with 7 bits for activations, no layer may multiply them.
    """
    if not (config.unit_gates and isinstance(graph.module(node), nn.Hardsigmoid)):
        return False
    kinds = {graph.kinds[reader] for reader in graph.readers(users)}
    return config.limits == INTEGERS[config.activation] or Kind.LAYER not in kinds


def _needs_channels(
    graph: Graph,
    node: fx.Node,
    users: list[fx.Node],
    config: QDQConfig,
    equalized: frozenset[str],
) -> bool:
    """Return whether the pair of `node`, which `users` read, has one scale per channel."""

    def allows(reader: fx.Node) -> bool:
        if config.scales == "apart":
            return graph.keeps_channels_apart(reader)
        return graph.depthwise(reader) and reader.target not in equalized

    readers = graph.readers(users)
    if config.position == "inputs":
        readers = [reader for reader in readers if reader.target not in ADDITIONS]
    if config.scales == "tensor" or not readers or graph.mixes_when_moved(node):
        return False
    return all(allows(reader) for reader in readers)


def _call(network: fx.GraphModule, node: fx.Node, name: str, users: list[fx.Node]) -> fx.Node:
    """Insert a call of module `name` after `node`, and make `users` read it."""
    with network.graph.inserting_after(node):
        new = network.graph.call_module(name, (node,))
    for user in users:
        user.replace_input_with(node, new)
    return new
