"""Operators that quantization knows, and what they do to the numbers that they read."""

import copy
import enum
import functools
import math
import operator
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from utils.errors import UserError
from utils.quantize.layers import WEIGHTED, is_depthwise


class Kind(enum.Enum):
    """The effect of an operator on numbers, which decides how its output is quantized."""

    INPUT = enum.auto()  # the images
    LAYER = enum.auto()  # a convolution or linear layer
    COMPUTING = enum.auto()  # new numbers
    AVERAGING = enum.auto()  # means, which lie within the range of the input
    MOVING = enum.auto()  # the same numbers, moved or selected
    OUTPUT = enum.auto()


class ScaledHardswish(nn.Module):
    """Hardswish between two factors per channel: hardswish(x * before) * after.

    `before` and `after` are float32 (channels,). `utils.quantize.equalization` chooses them.
    """

    def __init__(self, before: torch.Tensor, after: torch.Tensor):
        super().__init__()
        self.register_buffer("before", before.view(1, -1, 1, 1))
        self.register_buffer("after", after.view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.hardswish(x * self.before) * self.after


FLAT = {  # beyond these ends, the activation functions are flat
    nn.Hardswish: (-3.0, math.inf),
    nn.Hardsigmoid: (-3.0, 3.0),
    nn.ReLU6: (0.0, 6.0),
}
FOLLOWING = (nn.BatchNorm2d, nn.ReLU)  # computed together with the operator before them
IDLE = (nn.Dropout, nn.Identity)  # without effect in evaluation mode
ADDITIONS = (operator.add, operator.iadd, torch.add)
MODULES = {
    Kind.LAYER: WEIGHTED,
    Kind.COMPUTING: (*FOLLOWING, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, ScaledHardswish),
    Kind.AVERAGING: (nn.AdaptiveAvgPool2d,),
    Kind.MOVING: (nn.MaxPool2d, nn.Flatten, *IDLE),
}
FUNCTIONS = {
    Kind.COMPUTING: (*ADDITIONS, operator.mul, torch.mul),
    Kind.MOVING: (torch.flatten, operator.getitem, getattr),
}
TENSOR_METHODS = {Kind.MOVING: ("flatten", "view", "reshape", "contiguous", "size")}
ONE_NODE = {"placeholder": Kind.INPUT, "output": Kind.OUTPUT}


class Graph:
    """A traced network with the kind of each operator, by node.

    Raises `UserError` for an unknown operator, because it would stay unquantized.
    """

    def __init__(self, network: fx.GraphModule):
        self.network = network
        self.modules = dict(network.named_modules())
        self.nodes = list(network.graph.nodes)
        self.kinds = {node: self._kind(node) for node in self.nodes}

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that `node` calls; None if it calls none."""
        return self.modules.get(node.target) if node.op == "call_module" else None

    def _kind(self, node: fx.Node) -> Kind:
        module = self.module(node)
        if node.op in ONE_NODE:
            return ONE_NODE[node.op]
        if isinstance(module, nn.Conv2d):
            _check_padding(module, node.name)
        listed, matches = {
            "call_module": (MODULES, lambda types: isinstance(module, types)),
            "call_function": (FUNCTIONS, lambda targets: node.target in targets),
            "call_method": (TENSOR_METHODS, lambda targets: node.target in targets),
            "get_attr": ({}, None),
        }[node.op]
        for kind, entries in listed.items():
            if matches(entries):
                return kind
        if module is None:
            name = getattr(node.target, "__name__", node.target)
        else:
            name = type(module).__name__
        raise UserError(
            f"quantization does not know the operator {name} ({node.name}), so it would stay "
            "unrounded. Add it to utils/quantize/operators.py, with a test."
        )

    def computes(self, node: fx.Node) -> bool:
        """Return whether the output of `node` holds new numbers."""
        return self.kinds[node] in (Kind.INPUT, Kind.LAYER, Kind.COMPUTING, Kind.AVERAGING)

    def followed(self, node: fx.Node) -> fx.Node | None:
        """Return the BatchNorm or ReLU that is computed together with `node`, or None.

        Dropout and identities between them are skipped.
        """
        users = list(node.users)
        while len(users) == 1 and isinstance(self.module(users[0]), IDLE):
            users = list(users[0].users)
        fusible = (
            len(users) == 1
            and isinstance(self.module(users[0]), FOLLOWING)
            and node.op != "placeholder"
        )
        return users[0] if fusible and self.computes(node) else None

    def first(self, node: fx.Node) -> fx.Node:
        """Return the operator that `node`, a BatchNorm or ReLU, is computed together with.

        Dropout and identities are skipped. Returns `node` itself if there is none.
        """
        while isinstance(self.module(node), (*FOLLOWING, *IDLE)):
            before = node.args[0]
            while isinstance(self.module(before), IDLE):
                before = before.args[0]
            if isinstance(self.module(node), FOLLOWING) and self.followed(before) is not node:
                break
            node = before
        return node

    @staticmethod
    def inside(node: fx.Node, names: tuple[str, ...]) -> bool:
        """Return whether `node` belongs to one of the modules `names` or to a module inside one."""
        if node.op == "call_module":
            path = node.target
        else:
            path = next(reversed(node.meta.get("nn_module_stack") or [""]))
        return any(path == name or path.startswith(f"{name}.") for name in names)

    def readers(self, users: Iterable[fx.Node]) -> list[fx.Node]:
        """Return the operators among `users`.

        An operator that moves numbers is replaced by the operators that read them afterwards.
        """
        readers = []
        for user in users:
            if self.kinds[user] is Kind.MOVING:
                readers.extend(self.readers(user.users))
            elif self.kinds[user] is not Kind.OUTPUT:
                readers.append(user)
        return readers

    def useful(self, readers: list[fx.Node]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the ends of the range beyond which no reader distinguishes numbers.

        They are float32, of shape () or (1, channels, 1, 1), and one may be infinite: hardswish is
        0 below -3, hardsigmoid 0 below -3 and 1 above 3, ReLU6 0 below 0 and 6 above 6. None if a
        reader distinguishes all numbers.
        """
        lows, highs = [], []
        for module in map(self.module, readers):
            if not isinstance(module, (*FLAT, ScaledHardswish)):
                return None
            low, high = FLAT.get(type(module), FLAT[nn.Hardswish])
            lows.append(low / getattr(module, "before", torch.tensor(1.0)))
            highs.append(high)
        if not readers:
            return None
        return functools.reduce(torch.minimum, lows), torch.tensor(max(highs))

    def depthwise(self, node: fx.Node) -> bool:
        """Return whether `node` is a convolution with one filter per channel."""
        return is_depthwise(self.module(node))

    def keeps_channels_apart(self, node: fx.Node) -> bool:
        """Return whether `node` never sums over channels: each has a separate accumulator."""
        if self.kinds[node] is Kind.LAYER:
            return self.depthwise(node)
        # Moving operators, of which only reshaping ones mix channels, were skipped by `readers`.
        return self.kinds[node] in (Kind.COMPUTING, Kind.AVERAGING)

    def mixes_when_moved(self, node: fx.Node) -> bool:
        """Return whether a reader reshapes `node`: its channels are no longer a dimension."""
        plain = (nn.MaxPool2d, *IDLE)
        moving = [user for user in node.users if self.kinds[user] is Kind.MOVING]
        return any(
            not isinstance(self.module(user), plain) or self.mixes_when_moved(user)
            for user in moving
        )


def _check_padding(convolution: nn.Conv2d, name: str) -> None:
    mode, padding = convolution.padding_mode, convolution.padding
    if mode != "zeros" or isinstance(padding, str):
        kind = mode if mode != "zeros" else padding
        raise UserError(
            "quantization knows convolutions padded by numbers of zeros only, "
            f"not {kind!r} ({name})."
        )


def folded(model: nn.Module) -> fx.GraphModule:
    """Copy `model` to the CPU in evaluation mode, with BatchNorm folded into convolutions.

    Dropout and identities, which do nothing in evaluation mode, are removed. Average pooling
    called as a function, as in MobileNetV2, becomes a module.
    """
    network = fuse(copy.deepcopy(model).cpu().eval())
    network.meta["architecture"] = getattr(model, "architecture", "")
    for node in list(network.graph.nodes):
        if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
            x, size = (*node.args, *node.kwargs.values())
            network.add_submodule(node.name, nn.AdaptiveAvgPool2d(size))
            with network.graph.inserting_after(node):
                node.replace_all_uses_with(network.graph.call_module(node.name, (x,)))
            network.graph.erase_node(node)
            continue
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), IDLE):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    network.graph.lint()
    network.recompile()
    network.delete_all_unused_submodules()
    return network
