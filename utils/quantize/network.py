"""The quantized network: integers, scales and zero-points, decided once for all engines.

It is the folded float network with Q/DQ pairs where its configuration asks for them, and with
integer weights. `utils.quantize.exact` executes it exactly, and a backend lowers it by exporting
it. It uses torch's `quantized_decomposed` operators, which torch's exporters and the engines'
compilers understand.

The scheme is from Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (arXiv:1712.05877): a number is scale x (integer - zero-point);
weights have zero-point 0 and one scale per output channel.
"""

import copy
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import fx, nn

from utils import architectures, torch_file
from utils.errors import UserError
from utils.quantize import insertion
from utils.quantize.insertion import Inserted
from utils.quantize.layers import weighted
from utils.quantize.modules import QDQ, QuantizedLayer
from utils.quantize.operators import ScaledHardswish, folded
from utils.quantize.qdq_config import QDQConfig

FILE_FORMAT = 5


@dataclass
class Quantized:
    """A quantized network, and the float network that it was made from."""

    architecture: str  # key of catalog.MODELS
    config: QDQConfig
    keep_fp32: tuple[str, ...]  # modules that stay in FP32
    network: fx.GraphModule
    qdqs: Inserted
    fp32: nn.Module | None = None  # the folded float network; not in the file

    @classmethod
    def skeleton(
        cls, fp32: fx.GraphModule, config: QDQConfig, keep_fp32: tuple[str, ...]
    ) -> "Quantized":
        """Build the quantized form of a folded float network, without numbers yet.

        `fp32` is copied. Modules that stay in FP32 keep its weights.
        """
        network = copy.deepcopy(fp32)
        qdqs = insertion.insert(network, config, keep_fp32, partial(QDQ, config.activation))
        for name, layer in weighted(network).items():
            if name in qdqs.reads:
                network.set_submodule(name, QuantizedLayer(layer, config))
        architecture = fp32.meta.get("architecture", "")
        return cls(architecture, config, keep_fp32, network.eval(), qdqs, fp32)

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized convolutions and linear layers by name, in order of computation."""
        return {name: self.network.get_submodule(name) for name in self.qdqs.reads}

    def qdq(self, name: str) -> QDQ:
        """Return the Q/DQ pair called `name`."""
        return self.network.get_submodule(name)

    def input_scale(self, layer: str) -> torch.Tensor:
        """Return the scale of the Q/DQ pair that a layer reads, float32 () or (channels,)."""
        return self.qdq(self.qdqs.reads[layer]).scale

    def save(self, path: Path) -> None:
        """Write the quantized network to `path`; `load` reads it."""
        state = {}
        for name, value in self.network.state_dict().items():
            # If a tensor shares memory with a larger one, torch.save would write the larger one.
            value = value.detach().clone()
            # Zero-points have at most 16 bits, although torch's operators take 64.
            state[name] = value.to(torch.int16) if value.dtype is torch.int64 else value
        scaled = {
            name: module.before.numel()
            for name, module in self.network.named_modules()
            if isinstance(module, ScaledHardswish)
        }
        content = {
            "format": FILE_FORMAT,
            "architecture": self.architecture,
            "config": self.config.describe(),
            "keep_fp32": self.keep_fp32,
            "scaled": scaled,
            "state_dict": state,
        }
        path.write_bytes(torch_file.packed(content))

    @classmethod
    def load(cls, path: Path, model: nn.Module | None = None) -> "Quantized":
        """Read the quantized network in `path`.

        `model` gives the structure if the catalog lacks the architecture. Raises `UserError` if
        `path` does not hold a quantized network of this version.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["format"] != FILE_FORMAT:
                raise ValueError
        except Exception:  # a damaged file can raise anything
            raise UserError(
                f"{path}: holds no quantized network that this version can read; delete it and "
                "run again."
            ) from None
        fp32 = folded(model or architectures.build(content["architecture"]))
        for name, channels in content["scaled"].items():
            fp32.set_submodule(name, ScaledHardswish(*torch.ones(2, channels)))
        config = QDQConfig.of(content["config"])
        result = cls.skeleton(fp32, config, tuple(content["keep_fp32"]))
        state = content["state_dict"]
        for name in result.qdqs.source:
            result.qdq(name).assign(state[f"{name}.scale"], state[f"{name}.zero_point"])
        result.network.load_state_dict(state)
        result.architecture, result.fp32 = content["architecture"], None
        return result

    def digest(self) -> str:
        """Return 64 hexadecimal digits that identify the network and all its numbers."""
        decided = (self.architecture, self.config, self.keep_fp32, self.network.code)
        total = hashlib.sha256(str(decided).encode())
        for name, value in self.network.state_dict().items():
            total.update(name.encode())
            total.update(value.contiguous().cpu().numpy().tobytes())
        return total.hexdigest()
