"""INT16 arithmetic simulated in FP32; see utils/quantize/fixed_point.py."""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import nn

from utils.backends.base import Deployed, Predictor, Stored, plain_layers
from utils.quantize import fixed_point
from utils.training import architectures
from utils.training.checkpoints import Checkpoint


class Simulated:
    """The backend of simulated INT16, on any device that computes in FP32."""

    name, suffix, watched = "simulated", ".int16.pt", False
    layout = torch.channels_last

    def problem(self) -> str | None:
        return None

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Quantize a float `model` to INT16 by PTQ, calibrated on `images`.

        `images` are float32 (n, 3, 224, 224), normalised. Recipe: see
        `fixed_point.activation_scales`.
        """
        reference = fixed_point.folded(model)
        scales = fixed_point.activation_scales(reference, images, recipe)
        content = {"architecture": model.architecture} | fixed_point.integers(reference, scales)
        network = fixed_point.assemble(model, content)
        weights = [Stored(x.numel(), 8 * x.element_size(), name) for name, x in content["weight"].items()]
        biases = [Stored(x.numel(), 8 * x.element_size()) for x in content["bias"].values()]
        return Deployed(
            backend=self,
            predict=network,
            save=lambda path: torch.save(content, path),
            network=network,
            layers=plain_layers(network),
            stored=(*weights, *biases),
            reference=reference,
            facts={"activation_scales": sum(scale.numel() for scale in scales.values())},
        )

    def training(self, recipe: dict) -> tuple[str, dict]:
        return "", {name: recipe[name] for name in ("activations", "headroom", "calibration_images")}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        return fixed_point.trainable(model, images, recipe)

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Quantize the trained weights as PTQ does, with ranges recalibrated on `images`."""
        model = copy.deepcopy(model)
        weights = trained.model.state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return dataclasses.replace(self.quantize(model, images, recipe), fake_quant=trained.model)

    def load(self, path: Path, device: str) -> Predictor:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return fixed_point.assemble(architectures.build(content["architecture"]), content).to(device)


ENGINES = {"simulated": Simulated()}
