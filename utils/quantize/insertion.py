"""Insertion of Q/DQ pairs into a network, where a configuration asks for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from utils.errors import UserError
from utils.quantize.operators import ADDITIONS, IDLE, Graph, Kind
from utils.quantize.qdq_config import QDQConfig


@dataclass
class Inserted:
    """The Q/DQ pairs in a graph, by name, and what surrounds them."""

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
    make: Callable[[], nn.Module],
    equalized: frozenset[str] = frozenset(),
) -> Inserted:
    """Insert a module `make()` at every place of a Q/DQ pair in `network`, in place.

    Operators inside the modules `keep_fp32` are not quantized. Operators that are computed together,
    such as a convolution with its BatchNorm and ReLU, share a pair. It is named after the first of
    them, so that its name does not depend on folding. One scale is enough for the inputs of the
    depthwise convolutions `equalized`. Raises `UserError` for an unknown operator, and for a
    quantized layer that is called on several tensors.
    """
    graph = Graph(network)
    places = _places(graph, config, keep_fp32)
    firsts = {node: graph.first(node) for node in places}  # before any pair stands in between
    inserted = Inserted({}, {}, set(), {}, set(), {})
    carried: dict[fx.Node, str] = {}  # tensor -> the pair whose values it holds
    for node in graph.nodes:
        moved = _moved(graph, node, carried)
        if node in places:
            first = firsts[node]
            name = f"qdq_{first.name}"
            inserted.source[name] = first.target if first.op == "call_module" else first.name
            if config.unit_gates and isinstance(graph.module(node), nn.Hardsigmoid):
                inserted.gates.add(name)
            if _needs_channels(graph, node, places[node], config, equalized):
                inserted.channelwise.add(name)
            inserted.useful[name] = graph.useful(graph.readers(places[node]))
            averages = graph.kinds[node] is Kind.AVERAGING
            if averages and config.pooling_keeps_scale and node.args[0] in carried:
                inserted.same_as[name] = carried[node.args[0]]
            network.add_submodule(name, make())
            carried[_call(network, node, name, places[node])] = name
        elif moved:
            # The same pair again changes nothing, but it tells an engine that the operator may
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
        logits = [
            node for node in places if {graph.kinds[user] for user in places[node]} == {Kind.OUTPUT}
        ]
        places = {node: users for node, users in places.items() if node not in logits}
    return places


def _inputs(graph: Graph, keep_fp32: tuple[str, ...], sums: bool) -> dict[fx.Node, list[fx.Node]]:
    """Return the tensors that quantized layers read, and if `sums` additions, each with these readers.

    Max pooling gives the same numbers whether it reads rounded ones or its output is rounded. Engines
    are faster on integers, so the tensor before it is rounded.
    """
    places: dict[fx.Node, list[fx.Node]] = {}
    for reader in graph.nodes:
        is_sum = sums and reader.target in ADDITIONS
        if graph.inside(reader, keep_fp32) or not (is_sum or graph.kinds[reader] is Kind.LAYER):
            continue
        for node in reader.all_input_nodes if is_sum else reader.args[:1]:
            user = reader
            while isinstance(graph.module(node), nn.MaxPool2d):
                user, node = node, node.args[0]
            readers = places.setdefault(node, [])
            if user not in readers:
                readers.append(user)
    return places


def _outputs(graph: Graph, keep_fp32: tuple[str, ...]) -> dict[fx.Node, list[fx.Node]]:
    """Return the outputs of all quantized operators and what these read, each with its users."""

    def quantized(node: fx.Node) -> bool:
        return not graph.inside(node, keep_fp32) and graph.kinds[node] not in (
            Kind.INPUT,
            Kind.OUTPUT,
        )

    return {
        node: list(node.users)
        for node in graph.nodes
        if graph.computes(node)
        and graph.followed(node) is None
        and (quantized(graph.first(node)) or any(map(quantized, graph.readers(node.users))))
    }


def _moved(graph: Graph, node: fx.Node, carried: dict[fx.Node, str]) -> str | None:
    """Return the pair whose values `node` moves or selects; None if it moves none, or no tensor."""
    is_tensor = isinstance(graph.module(node), nn.MaxPool2d | nn.Flatten) or node.target in (
        torch.flatten,
        "flatten",
        "view",
        "reshape",
        "contiguous",
    )
    return carried.get(node.args[0]) if graph.kinds[node] is Kind.MOVING and is_tensor else None


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
    """Insert a call of module `name` after `node`, and let `users` read it."""
    with network.graph.inserting_after(node):
        new = network.graph.call_module(name, (node,))
    for user in users:
        user.replace_input_with(node, new)
    return new
