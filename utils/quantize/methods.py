"""PTQ and the start of QAT, composed from their steps as the recipe says."""

import torch
from torch import fx, nn

from utils.quantize import adaround, fake_quant
from utils.quantize.bias_correction import correct_biases
from utils.quantize.initialize import initialize
from utils.quantize.layers import blocks
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import QDQConfig
from utils.quantize.reconstruction import reconstruct
from utils.recipes import Int8, Int16


def ptq(
    model: nn.Module, images: torch.Tensor, recipe: Int8 | Int16, config: QDQConfig
) -> Quantized:
    """Quantize a float `model` by post-training quantization, for the engines of `config`.

    `images`, float32 (n, 3, 224, 224) normalised, are for calibration. The model is not changed.
    """
    if recipe.reconstruct:
        network = start_qat(model, images, recipe, config.in_training)
        return fake_quant.to_integers(network, recipe.keep_fp32, config)
    quantized = initialize(model, images, recipe, config)
    if recipe.adaround:
        adaround.adapt(quantized, images)
    if recipe.bias_correction:
        correct_biases(quantized, images)
    return quantized


def start_qat(
    model: nn.Module, images: torch.Tensor, recipe: Int8 | Int16, config: QDQConfig
) -> fx.GraphModule:
    """Return the network that QAT trains: fake-quantized, with the numbers of PTQ by `recipe`.

    `config` is a configuration `in_training`. `images` are as for `ptq`.
    """
    quantized = initialize(model, images, recipe, config)
    if recipe.bias_correction:
        correct_biases(quantized, images)
    network = fake_quant.fake_quantized(quantized, images)
    if recipe.reconstruct:
        reconstruct(network, quantized.fp32, blocks(model), images)
    return network
