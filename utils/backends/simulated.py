"""INT16, simulated: no engine here has 16-bit integer kernels, so the integers are carried in FP32.

Every weight is one of 65,535 and every activation one of 65,536 integers, exactly those that integer hardware would have; the
file stores the integers. Only sums are rounded otherwise than there (24 bits, where hardware has more). So accuracy and size are
those of INT16, and speed is never claimed. The scheme is that of Jacob et al. 2018 (arXiv:1712.05877) at 16 bits, symmetric:
weights with a scale for each output channel, biases 32 bits at the scale of the products, activations with a scale for each
tensor - or for each channel where whatever reads the tensor never adds channels up (activation functions, depthwise
convolutions, means over positions, sums and products of tensors), because there every channel has its own accumulator anyway.
"""

import copy
import dataclasses
import operator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from utils import architectures, calibrate
from utils.backends.base import Deployed, Predictor
from utils.checkpoints import Checkpoint

BITS = 16
LOW, HIGH = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
BIAS_HIGH = 2**31 - 1
WEIGHTED = (nn.Conv2d, nn.Linear)
ELEMENTWISE = (nn.ReLU, nn.Hardswish, nn.Hardsigmoid, nn.AdaptiveAvgPool2d)
COMPUTING = (*WEIGHTED, *ELEMENTWISE, nn.BatchNorm2d)  # others only move or select numbers
FUNCTIONS = (operator.add, operator.iadd, operator.mul, torch.add, torch.mul)


class Fixed(nn.Module):
    """Rounds a tensor to the nearest of the 65,536 multiples of its scale that 16 bits can hold (ties to even).

    The scale is a number, or one for each channel, shape (1, channels, 1, 1). Gradients pass as if nothing were rounded, and
    stop where values are clipped: the straight-through estimator of Bengio et al. 2013 (arXiv:1308.3432).
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = torch.clamp(torch.round(x / self.scale), LOW, HIGH) * self.scale
        if not torch.is_grad_enabled():
            return rounded
        clipped = torch.clamp(x, LOW * self.scale, HIGH * self.scale)
        return clipped + (rounded - clipped).detach()


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers int16 of the shape of `weight` (out, ...), and a scale float32 (out,), symmetric: +-max becomes +-32767."""
    weight = weight.detach()
    scale = weight.abs().flatten(1).amax(1) / HIGH
    scale[scale == 0] = 1.0
    return torch.clamp(torch.round(weight / _by_output(scale, weight)), -HIGH, HIGH).to(torch.int16), scale


def quantize_bias(bias: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers int32 (out,), and a scale float64 (out,): the accumulator's, which is the product of both scales.

    At 16 bits that product is so fine that 2^31 of it may be less than the bias: there the scale is what just holds it.
    """
    bias = bias.detach().double()
    scale = torch.maximum(input_scale.double() * weight_scale.double(), bias.abs() / BIAS_HIGH)
    return torch.round(bias / scale).to(torch.int32), scale


def _by_output(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """What the integers of `weight` stand for, with the gradient of `weight` itself."""
    integers, scale = quantize_weight(weight)
    return weight + (integers.float() * _by_output(scale, weight) - weight).detach()


class RoundedConv2d(nn.Conv2d):
    """A convolution that computes on rounded weights while FP32 weights are trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, _rounded(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """A linear layer that computes on rounded weights while FP32 weights are trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _rounded(self.weight), self.bias)


def insert(graph: fx.GraphModule, make) -> dict[str, str]:
    """Put a module `make()` after the input and after everything in `graph` that computes, in place.

    A layer directly followed by BatchNorm or ReLU is computed together with it, as on hardware, and gets one module after all
    of them. Returns, for each weighted layer, the name of the module whose output it reads (nodes that only move numbers apart).
    """
    modules = dict(graph.named_modules())
    reads: dict[str, str] = {}
    after: dict[fx.Node, str] = {}
    for node in list(graph.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, WEIGHTED):
            reads[node.target] = after[node.args[0]]
        computes = node.op == "placeholder" or isinstance(module, COMPUTING) or node.target in FUNCTIONS
        if computes and not _absorbed(node, modules):
            name = f"after_{node.name}"
            graph.add_submodule(name, make())
            with graph.graph.inserting_after(node):
                new = graph.graph.call_module(name, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            after[new] = name
        elif node.args and node.args[0] in after:
            after[node] = after[node.args[0]]
    graph.recompile()
    return reads


def _absorbed(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    users = list(node.users)
    into = len(users) == 1 and users[0].op == "call_module" and isinstance(modules[users[0].target], nn.ReLU | nn.BatchNorm2d)
    return into and node.op != "placeholder"


def channelwise(graph: fx.GraphModule, kind: type[nn.Module]) -> set[str]:
    """Names of the modules of `kind` whose output is never added up over channels by what reads it."""
    modules = dict(graph.named_modules())

    def apart(node: fx.Node) -> bool:
        return all(map(reads_apart, node.users))

    def reads_apart(user: fx.Node) -> bool:
        module = modules.get(user.target) if user.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            return module.groups == module.in_channels == module.out_channels
        if isinstance(module, nn.MaxPool2d | nn.Dropout | nn.Identity):  # these hand on what they read
            return apart(user)
        return isinstance(module, ELEMENTWISE) or user.target in FUNCTIONS

    nodes = [node for node in graph.graph.nodes if node.op == "call_module" and isinstance(modules[node.target], kind)]
    return {node.target for node in nodes if apart(node)}


def folded(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` on the CPU in evaluation mode, BatchNorm folded into the convolutions before it."""
    return fuse(copy.deepcopy(model).cpu().eval())


class Simulated:
    """INT16 arithmetic in FP32."""

    name, suffix, simulated, watched = "simulated", ".int16.pt", True, False
    layout = torch.channels_last

    def problem(self, device: str) -> str | None:
        return None

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Quantize `model` to INT16 with ranges from calibration `images` (n, 3, 224, 224), normalised.

        Recipe: `activations`, a range method of `utils.calibrate`, and `headroom`, a factor on its ranges: clipping a value that
        calibration did not see costs more than rounding all of them to two bits less.
        """
        reference = folded(model)
        scales = self.scales(reference, images, recipe)
        reads = insert(copy.deepcopy(reference), Fixed)
        content = {"architecture": model.architecture, "activation_scale": scales}
        content |= {"weight": {}, "weight_scale": {}, "bias": {}, "bias_scale": {}}
        for name, source in reads.items():
            layer = reference.get_submodule(name)
            content["weight"][name], content["weight_scale"][name] = quantize_weight(layer.weight)
            if layer.bias is not None:
                bias = quantize_bias(layer.bias, scales[source].flatten(), content["weight_scale"][name])
                content["bias"][name], content["bias_scale"][name] = bias
        numbers = sum(own.numel() for kind in ("weight", "bias") for own in content[kind].values())
        network = assemble(model, content)
        return Deployed(
            backend=self,
            predict=network,
            save=lambda path: torch.save(content, path),
            network=network,
            reference=reference,
            weight_modules=len(reads),
            quantized_modules=len(content["weight"]),
            parameters=numbers,
            quantized_parameters=numbers,
            weight_bytes=sum(own.numel() * own.element_size() for kind in ("weight", "bias") for own in content[kind].values()),
            facts={"activation_scales": sum(own.numel() for own in scales.values())},
        )

    def scales(self, network: fx.GraphModule, images: torch.Tensor, recipe: dict) -> dict[str, torch.Tensor]:
        """Scales float32 of every activation of `network`: shape () or, where channels stay apart, (1, channels, 1, 1)."""
        observed = copy.deepcopy(network).eval()
        insert(observed, calibrate.Magnitudes)
        for name in channelwise(observed, calibrate.Magnitudes):
            observed.get_submodule(name).channelwise = True
        method, headroom = recipe["activations"], recipe["headroom"]
        found = calibrate.magnitudes(observed, images, method)
        return {name: headroom * own.limit(method, BITS) / HIGH for name, own in found.items()}

    def training(self, recipe: dict) -> tuple[str, dict]:
        return "", {name: recipe[name] for name in ("activations", "headroom", "calibration_images")}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """A trainable graph of `model` with rounded weights and activations; its parameters keep their names.

        BatchNorm is not folded, so that it trains as in the control. That changes nothing: folding multiplies a channel's
        weights by one number, its scale takes that up, and the integers stay the same. Ranges stay as calibrated.
        """
        network = fx.symbolic_trace(copy.deepcopy(model).train())
        scales = self.scales(network, images, recipe)
        insert(network, Fixed)
        for name, scale in scales.items():
            network.get_submodule(name).scale = scale
        for module in network.modules():
            if isinstance(module, WEIGHTED):  # the same parameters, another forward()
                module.__class__ = RoundedConv2d if isinstance(module, nn.Conv2d) else RoundedLinear
        return network

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Quantize the trained weights as PTQ does, with the ranges that they have on `images` now."""
        model = copy.deepcopy(model)
        own = trained.model.state_dict()
        model.load_state_dict({name: own[name] for name in model.state_dict()})
        return dataclasses.replace(self.quantize(model, images, recipe), fake_quant=trained.model)

    def load(self, path: Path, device: str) -> Predictor:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return assemble(architectures.build(content["architecture"]), content).to(device)


def assemble(model: nn.Module, content: dict) -> nn.Module:
    """The simulated network of the integers and scales in `content`; of `model` only the structure is used."""
    network = folded(model)
    reads = insert(network, Fixed)
    for name, scale in content["activation_scale"].items():
        network.get_submodule(name).scale = scale
    for name in reads:
        layer = network.get_submodule(name)
        layer.weight.data = content["weight"][name].float() * _by_output(content["weight_scale"][name], layer.weight)
        if layer.bias is not None:
            layer.bias.data = (content["bias"][name].double() * content["bias_scale"][name]).float()
    return network.eval().to(memory_format=torch.channels_last)
