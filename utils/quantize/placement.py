"""Where a network is quantized, and in which formats: what a backend asks of the method.

A *pair* is a quantization followed at once by a dequantization: what reads it gets one of few
values. Engines recognise pairs in the exported graph and compute on integers between them. They
differ in where they want pairs, so each backend declares its `Placement`, and the method knows it
before it chooses ranges and corrects biases.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from utils.errors import UserError
from utils.quantize.layers import is_depthwise
from utils.quantize.operators import ADDITIONS, IDLE, Graph, Kind

INTEGERS = {  # lowest, highest
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.uint16: (0, 2**16 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
}

NARROW = 64  # largest magnitude of weights whose products with u8 can be added up by twos in 16 bits


@dataclass(frozen=True)
class Placement:
    """The pairs and number formats that a backend asks for.

    Backends with equal placements share one quantized network.
    """

    pairs: str  # "outputs" of all computing operators, or "inputs" of convolutions and linear layers only
    activation: torch.dtype = torch.uint8
    weight: torch.dtype = torch.int8
    bias: str = "float"  # "float", or "int32" in units of input scale times weight scale
    symmetric: bool = False  # whether the zero-points of activations are 0
    levels: int = 255  # steps between the ends of a calibrated range
    # Activations have a scale for each channel where no reader adds channels up ("apart"), or only
    # where depthwise convolutions read them and `equalize` does not make it needless ("needed"), or
    # nowhere ("tensor").
    scales: str = "tensor"
    rounded_sums: bool = False  # whether additions read rounded numbers; with pairs at "outputs" they always do
    centred: bool = False  # whether nearly symmetric ranges have the middle integer as zero-point, see `calibration.numbers`
    pooling_keeps_scale: bool = False  # whether an average has the scale of what it averages
    float_logits: bool = False  # whether the last operator's output is left as it is
    unit_gates: bool = False  # whether hardsigmoid, which ends at 1, always has the scale 1/256
    narrow: bool = False  # whether products of 8 bits overflow, so that one factor gets 7 bits, see `narrowed`
    narrow_depthwise: bool = False  # whether they overflow in depthwise convolutions, whose weights then get 7 bits
    weight_limit: int | None = None  # largest magnitude of an integer weight, if less than its format has

    @property
    def middle(self) -> int:
        """The zero-point of ranges that reach as far below 0 as above it."""
        return INTEGERS[self.activation][0] + (self.levels + 1) // 2

    def highest_weight(self, layer: nn.Module) -> int:
        """Largest magnitude of a weight of `layer`; the lowest integer is not used, so that 0 is the middle."""
        limits = [self.weight_limit, NARROW if self.narrow_depthwise and is_depthwise(layer) else None]
        return min([limit for limit in limits if limit], default=INTEGERS[self.weight][1])

    def narrowed(self, factor: str) -> "Placement":
        """Return the placement in which no product overflows.

        If it is narrow, `factor` is what gets 7 bits: "activations" or "weights". Engines of this
        kind add pairs of products u8 x s8 in 16 bits: 2 x 127 x 127 fits, and so does 2 x 255 x 64.
        Raises `ValueError` for another `factor`.
        """
        change = {"activations": {"levels": 127}, "weights": {"weight_limit": NARROW}}
        if factor not in change:
            raise ValueError(f"seven_bits={factor!r} in the recipe: give 'activations' or 'weights'")
        return dataclasses.replace(self, **change[factor]) if self.narrow else self

    def describe(self) -> dict:
        """Return all settings, JSON-serializable."""
        return {name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
                for name, value in vars(self).items()}  # fmt: skip

    @property
    def in_training(self) -> "Placement":
        """The placement that QAT rounds by, of which backends share one training.

        In training, biases are not rounded and logits are. int8 rounds as uint8 does, with
        zero-points lower by 128.
        """
        shifted = self.activation is torch.int8 and not self.symmetric
        activation = torch.uint8 if shifted else self.activation
        return dataclasses.replace(self, bias="float", float_logits=False, activation=activation)

    @classmethod
    def of(cls, settings: dict) -> "Placement":
        """Return the placement that `describe` described."""
        formats = {name: getattr(torch, settings[name]) for name in ("activation", "weight")}
        return cls(**settings | formats)


@dataclass
class Inserted:
    """The pairs in a graph, by name, and what is around them."""

    reads: dict[str, str]  # quantized convolution or linear layer -> the pair that it reads
    source: dict[str, str]  # pair -> the operator that it quantizes: its module, or the name of its node: "x", "add", ...
    channelwise: set[str]  # pairs with a scale for each channel
    same_as: dict[str, str]  # pair of an average -> the pair whose scale it has
    gates: set[str]  # pairs of hardsigmoids
    useful: dict[str, tuple[torch.Tensor, torch.Tensor] | None]  # pair -> see `Graph.useful`


def insert(network: fx.GraphModule, placement: Placement, keep_fp32: tuple[str, ...], make: Callable[[], nn.Module]) -> Inserted:
    """Insert a module `make()` at every place of a pair in `network`, in place.

    What belongs to the modules `keep_fp32` is not quantized. Operators that are computed together,
    such as a convolution with its BatchNorm and ReLU, share a pair. It is named after the first of
    them, so that its name is the same whether BatchNorm is folded or not. Raises `UserError` for an
    unknown operator, and for a quantized layer that is called on several tensors. Where
    `network.meta["even"]` is set, as by `equalize`, it says where none is "needed".
    """
    graph = Graph(network)
    places = _inputs(graph, keep_fp32, placement.rounded_sums) if placement.pairs == "inputs" else _outputs(graph, keep_fp32)
    if placement.float_logits:
        places = {node: users for node, users in places.items() if [graph.kinds[user] for user in users] != [Kind.OUTPUT]}
    firsts = {node: graph.first(node) for node in places}  # before any pair stands in between
    inserted = Inserted({}, {}, set(), {}, set(), {})
    carried: dict[fx.Node, str] = {}  # tensor -> the pair whose values it holds
    for node in graph.nodes:
        moved = _moved(graph, node, carried)
        if node in places:
            name = f"pair_{firsts[node].name}"
            inserted.source[name] = firsts[node].target if firsts[node].op == "call_module" else firsts[node].name
            _describe(inserted, graph, node, name, placement, places[node])
            if graph.kinds[node] is Kind.AVERAGING and placement.pooling_keeps_scale and node.args[0] in carried:
                inserted.same_as[name] = carried[node.args[0]]
            network.add_submodule(name, make())
            carried[_call(network, node, name, places[node])] = name
        elif moved:
            # The same pair again changes nothing, but tells an engine that the operator may compute on integers.
            carried[_call(network, node, moved, list(node.users))] = moved
        elif isinstance(graph.module(node), IDLE) and node.args[0] in carried:
            carried[node] = carried[node.args[0]]
        if graph.kinds[node] is Kind.LAYER and not graph.inside(node, keep_fp32):
            pair = carried[node.args[0]]
            if inserted.reads.setdefault(node.target, pair) != pair:
                raise UserError(f"{node.target} reads tensors of different scales. Keep it in FP32 by `keep_fp32` of the recipe.")
    network.recompile()
    return inserted


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
        return not graph.inside(node, keep_fp32) and graph.kinds[node] not in (Kind.INPUT, Kind.OUTPUT)

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


def _describe(inserted: Inserted, graph: Graph, node: fx.Node, name: str, placement: Placement, users: list[fx.Node]) -> None:
    if placement.unit_gates and isinstance(graph.module(node), nn.Hardsigmoid):
        inserted.gates.add(name)
    readers = graph.readers(users)
    inserted.useful[name] = graph.useful(readers)
    even = graph.network.meta.get("even", ())
    apart = {
        "apart": graph.keeps_channels_apart,
        "needed": lambda reader: graph.depthwise(reader) and reader.target not in even,
        "tensor": lambda _: False,
    }[placement.scales]
    deciding = [reader for reader in readers if not (placement.pairs == "inputs" and reader.target in ADDITIONS)]
    if deciding and all(map(apart, deciding)) and not graph.mixes_when_moved(node):
        inserted.channelwise.add(name)


def _call(network: fx.GraphModule, node: fx.Node, name: str, users: list[fx.Node]) -> fx.Node:
    """Insert a call of module `name` after `node`, and let `users` read it."""
    with network.graph.inserting_after(node):
        new = network.graph.call_module(name, (node,))
    for user in users:
        user.replace_input_with(node, new)
    return new
