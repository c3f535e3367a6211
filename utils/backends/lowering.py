"""The part that all backends of integer networks share: PTQ and QAT by the method, then `lower`."""

import copy
import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn

from utils import environment
from utils.backends.base import Deployed, Halved, Stored, stored_parameters
from utils.quantize import ptq, qat, reconstruction
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoint

HALF = Halved()  # how recipes without `bits` train


class Lowering(ABC):
    """A backend that lowers a `Quantized` network to a file and runs that file."""

    watched = False

    @abstractmethod
    def default_config(self, bits: int) -> QDQConfig:
        """Return the pairs and formats that this backend asks for on this machine.

        `bits` are those of weights and activations, 8 or 16, as the recipe says.
        """

    def qdq_config(self, recipe: dict) -> QDQConfig:
        """Return the placement for a `recipe` with `bits`.

        `seven_bits` names the factor of products that has 7 bits where products of 8 bits overflow:
        "activations", the default, as reduce_range does in torch, or "weights", as in ONNX Runtime.
        With `narrow` true, it has them on every machine, for a file that also serves those without VNNI.
        """
        config = self.default_config(recipe["bits"])
        if recipe.get("narrow"):
            config = dataclasses.replace(config, narrow=True, narrow_depthwise=False)
        return config.narrowed(recipe.get("seven_bits", "activations"))

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

    def deploy(self, quantized: Quantized) -> Deployed:
        """Describe `quantized` as this backend deploys it."""
        return Deployed(
            backend=self,
            save=lambda path: self.lower(quantized, path),
            stored=stored(quantized),
            fp32=quantized.fp32,
            quantized=quantized,
            facts={"placement": quantized.config.describe(), "quantized": sorted(quantized.layers)},
        )

    def deploy_half(self, model: nn.Module) -> Deployed:
        """Describe a float `model` as this backend deploys it in FP16."""
        network = folded(model)
        numbers = stored_parameters(copy.deepcopy(network).half())
        return Deployed(
            backend=self, save=lambda path: self.lower_half(network, path), stored=numbers
        )

    def with_network(self, deployed: Deployed, network: nn.Module) -> Deployed:
        """Return `deployed` with the module that torch runs, which must answer as the file does."""
        return dataclasses.replace(deployed, predict=network, network=network)

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert a float `model` by PTQ; see `ptq.quantize`, and for a `recipe` with `reconstruct` that.

        A `recipe` without `bits`, as those of FP16, has no integers.
        """
        if "bits" not in recipe:
            return self.deploy_half(model)
        return self.deploy(self.quantized(model, images, recipe))

    def quantized(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Quantized:
        """Return the network that `quantize` deploys, by a `recipe` with `bits`."""
        method = reconstruction.reconstruct if recipe.get("reconstruct") else ptq.quantize
        return method(model, images, recipe, self.qdq_config(recipe))

    def training(self, recipe: dict) -> tuple[str, dict]:
        if "bits" not in recipe:
            return HALF.training(recipe)
        settings = {name: recipe[name] for name in qat.SETTINGS if name in recipe}
        settings["placement"] = self.qdq_config(recipe).in_training.describe()
        return checkpoints.fingerprint(**settings["placement"])[:6], settings

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """Return a trainable network; see `qat.trainable`, or without `bits` `base.Halved`.

        By a `recipe` with `reconstruct` its blocks are reconstructed, as those of PTQ.
        """
        if "bits" not in recipe:
            return HALF.prepare(model, images, recipe)
        method = reconstruction.trainable if recipe.get("reconstruct") else qat.trainable
        return method(model, images, recipe, self.qdq_config(recipe).in_training)

    def convert(
        self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict
    ) -> Deployed:
        """Convert a trained network: to integers with the ranges of its training, or to FP16."""
        if "bits" not in recipe:
            return self.deploy_half(qat.plain(trained.model, model))
        quantized = qat.convert(trained.model, recipe, self.qdq_config(recipe))
        return dataclasses.replace(self.deploy(quantized), fake_quant=trained.model)


def not_installed(requirements: str, *packages: str) -> str | None:
    """Return which of `packages` are missing and the file that installs them; None if none is."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return (
        f"not installed: {', '.join(missing)} (pip install -r {requirements})" if missing else None
    )


def u8s8_is_narrow() -> bool:
    """Return whether kernels that multiply u8 by s8 are `narrow` on this machine: without VNNI."""
    return not environment.has_vnni()


def stored(quantized: Quantized) -> tuple[Stored, ...]:
    """Return the integer weights, the biases and what stays in FP32 as `Stored`."""
    layers = quantized.layers.items()
    weights = [
        Stored(layer.weight.numel(), 8 * layer.weight.element_size(), name)
        for name, layer in layers
    ]
    biases = [Stored(layer.bias.numel(), 32) for _, layer in layers]
    return (*weights, *biases, *stored_parameters(quantized.network))
