"""The quantized network: every integer, scale and zero-point of it, decided once for all engines.

Its network is the folded float network with a `QDQ` wherever its placement asks for one, and with
the integers of every quantized weight. `utils.quantize.exact` executes it exactly; a backend
lowers it by exporting it. All of it is written with the `quantized_decomposed` operators of torch,
which torch's exporters and the engines' compilers understand.

The scheme is that of Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (arXiv:1712.05877): a number is scale x (integer - zero-point);
weights have zero-point 0 and a scale for each output channel.
"""

import copy
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx, nn

from utils import architectures
from utils.errors import UserError
from utils.quantize import insertion
from utils.quantize.insertion import Inserted
from utils.quantize.layers import weighted
from utils.quantize.modules import QDQ, QuantizedLayer
from utils.quantize.operators import ScaledHardswish, folded
from utils.quantize.qdq_config import QDQConfig
from utils.training import checkpoints

FORMAT = 4  # of the file


@dataclass
class Quantized:
    """A quantized network, what it was made from, and how."""

    architecture: str  # key of catalog.MODELS
    config: QDQConfig
    keep_fp32: tuple[str, ...]  # modules that stay in FP32
    network: fx.GraphModule
    qdqs: Inserted
    origin: dict[str, str] = field(
        default_factory=dict
    )  # of the numbers of a pair or layer, by name
    fp32: nn.Module | None = None  # the folded float network; not in the file

    @classmethod
    def skeleton(
        cls, network: fx.GraphModule, config: QDQConfig, keep_fp32: tuple[str, ...]
    ) -> "Quantized":
        """Build the quantized form of a float `network`, whose BatchNorm is folded, without numbers yet.

        `network` is copied. What stays in FP32 has its weights.
        """
        network = copy.deepcopy(network)
        qdqs = insertion.insert(network, config, keep_fp32, lambda: QDQ(config.activation))
        for name, layer in weighted(network).items():
            if name in qdqs.reads:
                network.set_submodule(name, QuantizedLayer(layer, config))
        return cls(network.meta.get("architecture", ""), config, keep_fp32, network.eval(), qdqs)

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized convolutions and linear layers by name, in order of computation."""
        return {name: self.network.get_submodule(name) for name in self.qdqs.reads}

    def qdq(self, name: str) -> QDQ:
        """Return the pair called `name`."""
        return self.network.get_submodule(name)

    def input_scale(self, layer: str) -> torch.Tensor:
        """Return the scale of the pair that a layer reads, float32 () or (channels,)."""
        return self.qdq(self.qdqs.reads[layer]).scale

    def save(self, path: Path) -> None:
        """Write the quantized network to `path`; `load` reads it."""
        # Of tensors that share memory with larger ones, torch.save would write all of the latter.
        state = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        # Zero-points are integers of at most 16 bits, whatever torch's operators take them as.
        state = {
            name: value.to(torch.int16) if value.dtype is torch.int64 else value
            for name, value in state.items()
        }
        content = {
            "format": FORMAT,
            "architecture": self.architecture,
            "placement": self.config.describe(),
        }
        scaled = {
            name: module.before.numel()
            for name, module in self.network.named_modules()
            if isinstance(module, ScaledHardswish)
        }
        content |= {
            "keep_fp32": self.keep_fp32,
            "scaled": scaled,
            "even": sorted(self.network.meta.get("even", ())),
        }
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
            raise UserError(
                f"{path}: holds no quantized network that this version can read; delete it and run again."
            ) from None
        network = folded(model or architectures.build(content["architecture"]))
        for name, channels in content["scaled"].items():
            network.set_submodule(name, ScaledHardswish(*torch.ones(2, channels)))
        network.meta["even"] = set(content["even"])
        result = cls.skeleton(
            network, QDQConfig.of(content["placement"]), tuple(content["keep_fp32"])
        )
        state = content["state_dict"]
        for name in result.qdqs.source:
            result.qdq(name).assign(state[f"{name}.scale"], state[f"{name}.zero_point"])
        result.network.load_state_dict(state)
        result.architecture, result.origin = content["architecture"], content["origin"]
        return result

    def digest(self) -> str:
        """Return 64 hexadecimal digits that identify the network and all its numbers."""
        total = hashlib.sha256(str((self.architecture, self.config, self.keep_fp32)).encode())
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
            if isinstance(module, QDQ):
                numbers = {"scale": module.scale.max().item(), "scales": module.scale.numel()}
                numbers |= {
                    "zero_point": module.zero_point.float().mean().item(),
                    "format": str(module.dtype),
                }
                kind = f"output of {self.qdqs.source[node.target]}"
            elif isinstance(module, QuantizedLayer):
                numbers = {
                    "scale": module.scale.max().item(),
                    "scales": module.scale.numel(),
                    "zero_point": 0,
                }
                numbers["format"] = f"{module.weight.dtype}, bias {self.config.bias}"
                kind = "convolution" if module.convolution else "linear"
            elif node.target in weighted(self.network):
                numbers, kind = (
                    {"scale": None, "scales": 0, "zero_point": None, "format": "torch.float32"},
                    type(module).__name__,
                )
            else:
                continue
            numbers["format"] = numbers["format"].replace("torch.", "")
            rows.append(
                {
                    "name": node.target,
                    "kind": kind,
                    **numbers,
                    "origin": self.origin.get(node.target, ""),
                }
            )
        return rows

    def __str__(self) -> str:
        """Return all numbers of the network as a table, one line for each pair and layer."""
        widths = 44, 34, 20, 6, 13, 5
        lines = [("name", "kind", "format", "scales", "largest scale", "zero", "origin")]
        for row in self.rows():
            scale = "" if row["scale"] is None else f"{row['scale']:.6g}"
            zero = "" if row["zero_point"] is None else f"{row['zero_point']:.0f}"
            lines.append(
                (
                    row["name"],
                    row["kind"],
                    row["format"],
                    str(row["scales"]),
                    scale,
                    zero,
                    row["origin"],
                )
            )
        return "\n".join("  ".join(map(str.ljust, line, (*widths, 0))).rstrip() for line in lines)
