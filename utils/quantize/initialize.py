"""The common start of PTQ, reconstruction and QAT: fold, equalize, calibrate and round."""

import torch
from torch import fx, nn

from utils.errors import UserError
from utils.quantize.calibration import calibrate
from utils.quantize.equalization import equalize
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8, Int16


def initialize(
    model: nn.Module, images: torch.Tensor, recipe: Int8 | Int16, config: QDQConfig
) -> Quantized:
    """Quantize a float `model` with calibrated ranges and weights rounded to the nearest.

    `images`, float32 (n, 3, 224, 224) normalised, are for calibration. The model is not changed.
    Raises `UserError` if `keep_fp32` of the recipe names a module that the model lacks.
    """
    network = folded(model)
    _check_names(model, network, recipe.keep_fp32)
    equalized = frozenset()
    if recipe.equalize:
        equalized = equalize(network, images, config, recipe)
    result = Quantized.skeleton(network, config, recipe.keep_fp32)
    for name, numbers in calibrate(network, images, config, recipe, equalized).items():
        result.qdq(name).assign(*numbers)
    for name, layer in result.layers.items():
        plain, scale = network.get_submodule(name), None
        if recipe.weight_scales == "tensor":
            scale = (plain.weight.detach().abs().max() / layer.high).expand(len(plain.weight))
        layer.quantize(plain, result.input_scale(name), scale)
    return result


def _check_names(model: nn.Module, network: fx.GraphModule, names: tuple[str, ...]) -> None:
    known = {*dict(model.named_modules()), *dict(network.named_modules())} - {""}
    for name in names:
        if name not in known:
            example = next(iter(dict(model.named_children())), "")
            raise UserError(
                f"RECIPE: keep_fp32 names {name!r}, a module that the network does not have. "
                f"Give names such as {example!r}; `named_modules()` of the model lists them."
            )
