"""Block reconstruction: each block of a quantized network learns its FP32 block's outputs.

The order is from BRECQ: Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by
Block Reconstruction" (arXiv:2102.05426), algorithm 1. Blocks learn one after another, from
calibration images without labels. A block reads the outputs of the quantized blocks before it, and
its targets are the values of the float network, so it also compensates for earlier errors. Unlike
in BRECQ, weights are not only rounded up or down: they learn by the straight-through estimator of
`utils.quantize.fake_quant`, with biases and the ranges of activations, and all squared errors have
the same weight.
"""

import math

import torch
import torch.nn.functional as F
from torch import fx

from utils import progress
from utils.quantize.calibration import BATCH
from utils.quantize.fake_quant import FakeQuantize

# Steps of a block at most, with one batch each. With 200, MobileNetV3-Small gained 0.1 dB.
MOST_STEPS = 100
PASSES = 25  # of a block over the images, at most
RATE = 1e-2  # at first, in the units of `utils.quantize.fake_quant`; it falls to 0 along a cosine
TINY = 1e-12  # smallest variance to divide by: a tensor may be constant


class Part:
    """Consecutive operators of a network, as a function of the values that they read.

    `read` are the nodes of these values. `given` are the nodes that operators outside read.
    """

    def __init__(self, network: fx.GraphModule, nodes: list[fx.Node]):
        self.nodes, self.interpreter = nodes, fx.Interpreter(network)
        inside = set(nodes)
        inputs = [source for node in nodes for source in node.all_input_nodes]
        self.read = [source for source in dict.fromkeys(inputs) if source not in inside]
        self.given = [node for node in nodes if not inside.issuperset(node.users)]
        modules = dict.fromkeys(
            network.get_submodule(node.target) for node in nodes if node.op == "call_module"
        )
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self.learning = [parameter for parameter in parameters if parameter.requires_grad]

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the values of `given` from the values of `read`."""
        values = self.interpreter.env = dict(zip(self.read, inputs, strict=True))
        for node in self.nodes:
            values[node] = self.interpreter.run_node(node)
        return [values[node] for node in self.given]

    @torch.no_grad()
    def answers(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the same for many images, batch by batch."""
        batches = zip(*(values.split(BATCH) for values in inputs), strict=True)
        outputs = [self(list(batch)) for batch in batches]
        return [torch.cat(values) for values in zip(*outputs, strict=True)]


def reconstruct(
    network: fx.GraphModule, fp32: fx.GraphModule, names: tuple[str, ...], images: torch.Tensor
) -> None:
    """Train the blocks `names` of a fake-quantized `network`, in place, one after another.

    `fp32` is the folded float network that `network` was made from. `images`, float32
    (n, 3, 224, 224) normalised, are for calibration.
    """
    parts = divide(network, names)
    given = {_source(network, node) for part in parts for node in part.given}
    wanted = _float_values(fp32, images, given)
    held = {node: images for node in network.graph.nodes if node.op == "placeholder"}
    with progress.Bar("reconstructing", len(parts), "blocks") as bar:
        for number, part in enumerate(parts):
            inputs = [held[node] for node in part.read]
            targets = [wanted[_source(network, node)] for node in part.given]
            held |= dict(zip(part.given, learn(part, inputs, targets), strict=True))
            needed = {node for later in parts[number + 1 :] for node in later.read}
            held = {node: values for node, values in held.items() if node in needed}
            bar.step()


def divide(network: fx.GraphModule, names: tuple[str, ...]) -> list[Part]:
    """Divide a network into the blocks `names`.

    An operator that belongs to none joins the operator before it.
    """
    parts: dict[str, list[fx.Node]] = {}
    current = next(iter(names), "")
    for node in network.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module":
            holders = [name for name in names if f"{node.target}.".startswith(f"{name}.")]
            current = holders[0] if holders else current
        parts.setdefault(current, []).append(node)
    return [Part(network, nodes) for nodes in parts.values()]


def learn(
    part: Part, inputs: list[torch.Tensor], targets: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Train `part` in place on `inputs` to compute `targets`, (n, ...) each; return its outputs.

    Training is undone unless it reduces the error on all images.
    """
    first_answers = part.answers(inputs)
    if not part.learning:
        return first_answers
    # Tensors have the same influence, whatever the size of their values.
    weights = [1 / target.var().clamp_min(TINY) for target in targets]

    def error(outputs: list[torch.Tensor], chosen: torch.Tensor | slice) -> torch.Tensor:
        compared = zip(outputs, targets, weights, strict=True)
        return sum(
            weight * F.mse_loss(output, target[chosen]) for output, target, weight in compared
        )

    first = [parameter.detach().clone() for parameter in part.learning]
    optimizer, generator = torch.optim.Adam(part.learning, RATE), torch.Generator().manual_seed(0)
    steps = min(MOST_STEPS, math.ceil(PASSES * len(inputs[0]) / BATCH))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.randperm(len(inputs[0]), generator=generator)[:BATCH]
        loss = error(part([values[chosen] for values in inputs]), chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    answers = part.answers(inputs)
    if error(answers, slice(None)) < error(first_answers, slice(None)):
        return answers
    for parameter, value in zip(part.learning, first, strict=True):
        parameter.data.copy_(value)
    return first_answers


def _source(network: fx.GraphModule, node: fx.Node) -> str:
    """Return the name of the node whose values `node` holds, or rounds if it is a Q/DQ pair."""
    while node.op == "call_module" and isinstance(network.get_submodule(node.target), FakeQuantize):
        node = node.args[0]
    return node.name


class _Recording(fx.Interpreter):
    """An interpreter that keeps the values of the nodes `names`, by name and batch."""

    def __init__(self, network: fx.GraphModule, names: set[str]):
        super().__init__(network)
        self.values: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def run_node(self, node):
        value = super().run_node(node)
        if node.name in self.values:
            # Activation functions may overwrite their input.
            self.values[node.name].append(value.clone())
        return value


@torch.no_grad()
def _float_values(
    network: fx.GraphModule, images: torch.Tensor, names: set[str]
) -> dict[str, torch.Tensor]:
    """Return the values of the nodes `names` of a float network on `images`."""
    recording = _Recording(network, names)
    for batch in images.split(BATCH):
        recording.run(batch)
    return {name: torch.cat(values) for name, values in recording.values.items()}
