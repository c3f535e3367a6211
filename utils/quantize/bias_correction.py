"""Empirical bias correction: match each layer's mean output to the float layer's."""

import torch

from utils.quantize import calibration
from utils.quantize.exact import ExactInterpreter
from utils.quantize.layers import channel_moments, mean_by_channel
from utils.quantize.modules import QuantizedLayer, along_channels
from utils.quantize.network import Quantized


class _Correcting(ExactInterpreter):
    """An exact run that matches each layer's mean output to the float network's.

    Layers are visited in the order of computation, so each reads inputs from corrected layers.
    """

    def __init__(self, quantized: Quantized, float_means: dict[str, torch.Tensor]):
        super().__init__(quantized)
        self.float_means = float_means

    def call_module(self, target, args, kwargs):
        output = super().call_module(target, args, kwargs)
        layer = self.fetch_attr(target)
        if not isinstance(layer, QuantizedLayer) or output[0, 0].numel() == 1:
            return output
        excess, before = mean_by_channel(output) - self.float_means[target], layer.bias.double()
        layer.set_bias(before - excess, self.quantized.input_scale(target))
        return output + along_channels(layer.bias.double() - before, output)


@torch.no_grad()
def correct_biases(quantized: Quantized, images: torch.Tensor) -> None:
    """Correct the biases of quantized layers in place, except those with one position per image.

    Rounding shifts the mean output of a channel. The shift is measured on `images`
    (n, 3, 224, 224) before the activation function, and subtracted from the bias. This is the
    empirical bias correction of Nagel et al. 2019, "Data-Free Quantization Through Weight
    Equalization and Bias Correction" (arXiv:1906.04721), section 4.2 and appendix D.

    Squeeze-and-excitation layers read the mean of an image, and most of their outputs lie where
    ReLU or hardsigmoid is flat. Matching the means shifted the few values that matter: with these
    layers also corrected, the logits of MobileNetV3-Small shrank by a fifth (SQNR 13.8 dB against
    20.4 dB on validation images).

    All images pass through a layer before the next layer runs: 256 images take about 8 GB in
    ResNet-18.
    """
    moments = channel_moments(quantized.fp32, images.split(calibration.BATCH))
    _Correcting(quantized, {name: mean for name, (mean, _) in moments.items()}).run(images.double())
