"""The part that all engines of quantized networks share: from a `Quantized` to a file."""

import copy
import dataclasses
import importlib.util
from abc import abstractmethod
from pathlib import Path

import torch
from torch import nn

from utils import environment
from utils.backends.base import Backend, Deployed, Lowered, Stored, stored_parameters
from utils.quantize import fake_quant, floating
from utils.quantize.methods import start_qat
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Fp16QAT, Int8, Int8QAT, Int16, Int16QAT
from utils.training import checkpoints

FLOAT_BITS = 32


class Lowering(Backend):
    """A backend that lowers a `Quantized` network to a file and runs that file."""

    overflows = True  # whether its kernels add products in 16 bits on some processors

    @abstractmethod
    def default_config(self, bits: int) -> QDQConfig:
        """Return the Q/DQ pairs and formats that this engine asks for on this machine.

        `bits` is the width of weights and activations, 8 or 16.
        """

    def qdq_config(self, recipe: Int8 | Int16) -> QDQConfig:
        """Return the Q/DQ configuration for `recipe`, with its remedy for overflow if needed."""
        config = self.default_config(recipe.bits)
        if recipe.activation_scales == "tensor":
            config = dataclasses.replace(config, scales="tensor")
        return config.fixed(recipe.overflow_fix, recipe.portable and self.overflows)

    def float_weights(self, quantized: Quantized) -> list[str]:
        """Return the quantized layers whose weights the file holds in FP32, rounded."""
        return []

    @abstractmethod
    def lower(self, quantized: Quantized, path: Path) -> None:
        """Write `quantized` to the artifact at `path`.

        Raises `UserError` if this engine could not run it.
        """

    def lower_half(self, network: nn.Module, path: Path) -> None:
        """Write a float `network`, without BatchNorm, to `path` in FP16.

        Only backends that serve FP16 have it.
        """
        raise NotImplementedError(self.name)

    def deploy(self, quantized: Quantized) -> Lowered:
        """Describe `quantized` as this backend deploys it."""
        return Lowered(
            backend=self,
            save=lambda path: self.lower(quantized, path),
            stored=stored(quantized, self.float_weights(quantized)),
            quantized=quantized,
            facts={
                "placement": quantized.config.describe(),
                "quantized": sorted(quantized.layers),
            },
        )

    def deploy_half(self, model: nn.Module) -> Deployed:
        """Describe a float `model` as this backend deploys it in FP16."""
        network = folded(model)
        numbers = stored_parameters(copy.deepcopy(network).half())
        return Deployed(
            backend=self, save=lambda path: self.lower_half(network, path), stored=numbers
        )

    def training_config(self, recipe: Int8QAT | Int16QAT | Fp16QAT) -> tuple[str, dict]:
        """Return a short tag, and what decides the result of QAT here besides the recipe."""
        if isinstance(recipe, Fp16QAT):
            return "", {"format": "fp16"}
        settings = self.qdq_config(recipe).in_training.describe()
        return checkpoints.fingerprint(**settings)[:6], settings

    def prepare(
        self, model: nn.Module, images: torch.Tensor, recipe: Int8QAT | Int16QAT | Fp16QAT
    ) -> nn.Module:
        """Return a trainable copy of `model` that rounds as the deployed network will.

        Ranges come from the calibration `images`, float32 (n, 3, 224, 224), normalised.
        """
        if isinstance(recipe, Fp16QAT):
            return floating.floating(model, images, half=True)
        return start_qat(model, images, recipe, self.qdq_config(recipe).in_training)

    def convert(
        self, trained: nn.Module, model: nn.Module, recipe: Int8QAT | Int16QAT | Fp16QAT
    ) -> Deployed:
        """Deploy the network that `prepare` returned, once QAT has trained it."""
        if isinstance(recipe, Fp16QAT):
            return self.deploy_half(floating.plain(trained, model))
        config = self.qdq_config(recipe)
        return self.deploy(fake_quant.to_integers(trained, recipe.keep_fp32, config))


def not_installed(requirements: str, *packages: str) -> str | None:
    """Return which of `packages` are missing and the file that installs them; None if none is."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"not installed: {', '.join(missing)} (pip install -r {requirements})"


def u8s8_overflow(*libraries: str) -> str:
    """Return the layers in which sums of u8 x s8 products overflow here: "all" without VNNI.

    `libraries` compute them; see `environment.has_vnni`.
    """
    return "none" if environment.has_vnni(*libraries) else "all"


def stored(quantized: Quantized, float_weights: list[str]) -> tuple[Stored, ...]:
    """Return the weights, the biases and what stays in FP32 as `Stored`.

    Weights are integers, except in the layers `float_weights`.
    """
    weights, biases = [], []
    for name, layer in quantized.layers.items():
        bits = FLOAT_BITS if name in float_weights else 8 * layer.weight.element_size()
        weights.append(Stored(layer.weight.numel(), bits, name))
        biases.append(Stored(layer.bias.numel(), 32))
    return (*weights, *biases, *stored_parameters(quantized.network))
