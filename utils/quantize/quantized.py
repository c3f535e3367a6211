"""The quantized network: every integer, scale and zero-point of it, decided once for all engines.

Its network is the folded float network with a `Pair` wherever its placement asks for one, and with
the integers of every quantized weight. `utils.quantize.reference` executes it exactly; a backend
lowers it by exporting it. All of it is written with the `quantized_decomposed` operators of torch,
which torch's exporters and the engines' compilers understand.

The scheme is that of Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (arXiv:1712.05877): a number is scale x (integer - zero-point);
weights have zero-point 0 and a scale for each output channel.
"""

import copy
import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.ao.quantization.fx._decomposed

from utils.errors import UserError
from utils.quantize import placement as placing
from utils.quantize.layers import weighted
from utils.quantize.operators import ScaledHardswish, folded
from utils.quantize.placement import INTEGERS, Inserted, Placement
from utils.training import architectures, checkpoints

OPS = torch.ops.quantized_decomposed
FORMAT = 4  # of the file
FAINT = 2.0**-20  # smallest scale of a channel's weights, relative to the layer's largest


class Pair(nn.Module):
    """Quantization of an activation, followed at once by its dequantization.

    Values are divided by `scale`, rounded to the nearest integer, ties to even, shifted by
    `zero_point` and clipped to the integers of the placement's format. `scale` is float32 and
    `zero_point` int64, both of shape () or (channels,).
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.assign(torch.tensor(1.0), torch.tensor(0))

    def assign(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Set the scale and the zero-point."""
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point.long())
        # Exporters need plain numbers: read from a tensor, they would become inputs of the graph.
        self.numbers = (self.scale.item(), self.zero_point.item()) if scale.ndim == 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.numbers:
            how = (*self.numbers, *INTEGERS[self.dtype], self.dtype)
            return OPS.dequantize_per_tensor.default(OPS.quantize_per_tensor.default(x, *how), *how)
        how = (self.scale, self.zero_point, 1, *INTEGERS[self.dtype], self.dtype)
        return OPS.dequantize_per_channel.default(OPS.quantize_per_channel.default(x, *how), *how)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with integer weights.

    `weight` holds integers (out, ...), `scale` float32 (out,). `bias` is float32 (out,). Where the
    placement asks for int32 biases, `bias_integers` are these, and `bias` holds their values.
    """

    def __init__(self, layer: nn.Module, placement: Placement):
        super().__init__()
        self.high = placement.highest_weight(layer)
        self.low = -self.high
        out = len(layer.weight)
        self.register_buffer("weight", torch.zeros_like(layer.weight, dtype=placement.weight))
        self.register_buffer("scale", torch.ones(out))
        self.register_buffer("zero_point", torch.zeros(out, dtype=torch.int64), persistent=False)  # all 0
        self.register_buffer("bias", torch.zeros(out))
        self.register_buffer("bias_integers", torch.zeros(out, dtype=torch.int32) if placement.bias == "int32" else None)
        is_convolution = isinstance(layer, nn.Conv2d)
        self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups) if is_convolution else None

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the layer's output on `x` with these weights."""
        if self.convolution is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, *self.convolution)

    def values(self) -> torch.Tensor:
        """Return the values of the integer weights, float32 (out, ...)."""
        return OPS.dequantize_per_channel.default(
            self.weight, self.scale, self.zero_point, 0, self.low, self.high, self.weight.dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x, self.values(), self.bias)

    def quantize(self, layer: nn.Module, input_scale: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Take the integers nearest to the weights and the bias of a float `layer`.

        `input_scale` is the scale of the pair that the layer reads. The scales of the weights are
        `scale` (out,), if given, or those of `quantize_weight`.
        """
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().float()
        smallest = 0.0
        if self.bias_integers is not None:
            # Nearly dead channels have tiny weights, and 2^31 of their steps may not reach the bias.
            smallest = bias.abs() / (input_scale * (INTEGERS[torch.int32][1] - 1))
        integers, self.scale = quantize_weight(layer.weight, self.high, smallest, scale)
        self.weight = integers.to(self.weight.dtype)
        self.set_bias(bias, input_scale)

    def set_bias(self, bias: torch.Tensor, input_scale: torch.Tensor) -> None:
        """Set the bias, float32 (out,), rounded as the placement asks; see `quantize`."""
        if self.bias_integers is None:
            self.bias = bias.float()
            return
        step = input_scale.double() * self.scale.double()
        low, high = INTEGERS[torch.int32]
        self.bias_integers = torch.clamp(torch.round(bias.double() / step), low, high).to(torch.int32)
        self.bias = (self.bias_integers.double() * step).float()


def quantize_weight(
    weight: torch.Tensor, highest: int, smallest: torch.Tensor | float = 0.0, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `weight` (out, ...) symmetrically, with one scale for each output channel.

    Returns integers, float32 (out, ...), and scales, float32 (out,). These are `scale`, if given;
    else the largest magnitude of a channel becomes `highest`. But no scale is below `smallest`, or
    below FAINT times the layer's largest. A channel of zeros has the layer's largest scale, and a
    layer of zeros 1.
    """
    weight = weight.detach()
    scale = weight.abs().flatten(1).amax(1) / highest if scale is None else scale.clone()
    largest = scale.max().item() or 1.0
    scale[scale == 0] = largest
    # XNNPACK refuses channels whose scale is under 2^-32 of that of the layer's output.
    # Denormal scales have few digits, and engines read them as 0.
    least = max(FAINT * largest, torch.finfo(torch.float32).tiny)
    scale = torch.maximum(scale, torch.as_tensor(smallest)).clamp_min(least)
    return torch.clamp(torch.round(weight / by_output(scale, weight)), -highest, highest), scale


def by_output(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reshape `scale` (out,) so that it broadcasts over `weight` (out, ...)."""
    return scale.view(-1, *[1] * (weight.ndim - 1))


def along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape `values`, () or (channels,), so that they broadcast over `x` (n, channels, ...)."""
    return values if values.ndim == 0 else values.view(1, -1, *[1] * (x.ndim - 2))


@dataclass
class Quantized:
    """A quantized network, what it was made from, and how."""

    architecture: str  # key of catalog.MODELS
    placement: Placement
    keep_fp32: tuple[str, ...]  # modules that stay in FP32
    network: fx.GraphModule
    pairs: Inserted
    origin: dict[str, str] = field(default_factory=dict)  # of the numbers of a pair or layer, by name
    reference: nn.Module | None = None  # the folded float network; not in the file

    @classmethod
    def skeleton(cls, network: fx.GraphModule, placement: Placement, keep_fp32: tuple[str, ...]) -> "Quantized":
        """Build the quantized form of a float `network`, whose BatchNorm is folded, without numbers yet.

        `network` is copied. What stays in FP32 has its weights.
        """
        network = copy.deepcopy(network)
        pairs = placing.insert(network, placement, keep_fp32, lambda: Pair(placement.activation))
        for name, layer in weighted(network).items():
            if name in pairs.reads:
                network.set_submodule(name, QuantizedLayer(layer, placement))
        return cls(network.meta.get("architecture", ""), placement, keep_fp32, network.eval(), pairs)

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized convolutions and linear layers by name, in order of computation."""
        return {name: self.network.get_submodule(name) for name in self.pairs.reads}

    def pair(self, name: str) -> Pair:
        """Return the pair called `name`."""
        return self.network.get_submodule(name)

    def input_scale(self, layer: str) -> torch.Tensor:
        """Return the scale of the pair that a layer reads, float32 () or (channels,)."""
        return self.pair(self.pairs.reads[layer]).scale

    def save(self, path: Path) -> None:
        """Write the quantized network to `path`; `load` reads it."""
        # Of tensors that share memory with larger ones, torch.save would write all of the latter.
        state = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        # Zero-points are integers of at most 16 bits, whatever torch's operators take them as.
        state = {name: value.to(torch.int16) if value.dtype is torch.int64 else value for name, value in state.items()}
        content = {"format": FORMAT, "architecture": self.architecture, "placement": self.placement.describe()}
        scaled = {
            name: module.before.numel() for name, module in self.network.named_modules() if isinstance(module, ScaledHardswish)
        }
        content |= {"keep_fp32": self.keep_fp32, "scaled": scaled, "even": sorted(self.network.meta.get("even", ()))}
        content |= {"origin": self.origin, "state_dict": state}
        path.write_bytes(checkpoints.packed(content))

    @classmethod
    def load(cls, path: Path, model: nn.Module | None = None) -> "Quantized":
        """Read the quantized network in `path`.

        `model` gives the structure if the architecture is none of the catalog's. Raises `UserError`
        if `path` holds no quantized network of this version.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["format"] != FORMAT:
                raise ValueError
        except Exception:  # a damaged file can raise anything
            raise UserError(f"{path}: holds no quantized network that this version can read; delete it and run again.") from None
        network = folded(model or architectures.build(content["architecture"]))
        for name, channels in content["scaled"].items():
            network.set_submodule(name, ScaledHardswish(*torch.ones(2, channels)))
        network.meta["even"] = set(content["even"])
        result = cls.skeleton(network, Placement.of(content["placement"]), tuple(content["keep_fp32"]))
        state = content["state_dict"]
        for name in result.pairs.source:
            result.pair(name).assign(state[f"{name}.scale"], state[f"{name}.zero_point"])
        result.network.load_state_dict(state)
        result.architecture, result.origin = content["architecture"], content["origin"]
        return result

    def digest(self) -> str:
        """Return 64 hexadecimal digits that identify the network and all its numbers."""
        total = hashlib.sha256(str((self.architecture, self.placement, self.keep_fp32)).encode())
        for name, value in self.network.state_dict().items():
            total.update(name.encode())
            total.update(value.contiguous().cpu().numpy().tobytes())
        return total.hexdigest()

    def rows(self) -> list[dict]:
        """Return one dict for each pair and each layer, in order of computation."""
        rows = []
        for node in self.network.graph.nodes:
            if node.op != "call_module" or any(row["name"] == node.target for row in rows):
                continue
            module = self.network.get_submodule(node.target)
            if isinstance(module, Pair):
                numbers = {"scale": module.scale.max().item(), "scales": module.scale.numel()}
                numbers |= {"zero_point": module.zero_point.float().mean().item(), "format": str(module.dtype)}
                kind = f"output of {self.pairs.source[node.target]}"
            elif isinstance(module, QuantizedLayer):
                numbers = {"scale": module.scale.max().item(), "scales": module.scale.numel(), "zero_point": 0}
                numbers["format"] = f"{module.weight.dtype}, bias {self.placement.bias}"
                kind = "convolution" if module.convolution else "linear"
            elif node.target in weighted(self.network):
                numbers, kind = {"scale": None, "scales": 0, "zero_point": None, "format": "torch.float32"}, type(module).__name__
            else:
                continue
            numbers["format"] = numbers["format"].replace("torch.", "")
            rows.append({"name": node.target, "kind": kind, **numbers, "origin": self.origin.get(node.target, "")})
        return rows

    def __str__(self) -> str:
        """Return all numbers of the network as a table, one line for each pair and layer."""
        widths = 44, 34, 20, 6, 13, 5
        lines = [("name", "kind", "format", "scales", "largest scale", "zero", "origin")]
        for row in self.rows():
            scale = "" if row["scale"] is None else f"{row['scale']:.6g}"
            zero = "" if row["zero_point"] is None else f"{row['zero_point']:.0f}"
            lines.append((row["name"], row["kind"], row["format"], str(row["scales"]), scale, zero, row["origin"]))
        return "\n".join("  ".join(map(str.ljust, line, (*widths, 0))).rstrip() for line in lines)
