"""Bias correction: subtract the mean error that rounding adds to a layer, without training."""

import torch
from torch import fx, nn

from utils.quantize.layers import mean_by_channel


class _Correcting(fx.Interpreter):
    """An interpreter that matches each layer's mean output to that of the float network.

    It runs a quantized graph once and changes the bias of every weighted layer. It visits layers in
    the order of computation, so each one reads inputs from layers that have been corrected.
    """

    def __init__(self, reference: fx.GraphModule, float_means: dict[str, torch.Tensor]):
        super().__init__(reference)
        self.float_means = float_means

    def call_module(self, target, args, kwargs):
        module = self.fetch_attr(target)
        # A fused module is a layer and its activation function; only the layer is corrected.
        fused = isinstance(module, nn.Sequential)
        layer, name = (module[0], f"{target}.0") if fused else (module, target)
        if name in self.float_means:
            excess = mean_by_channel(layer(*args)) - self.float_means[name]
            bias = torch.zeros_like(excess) if layer.bias is None else layer.bias
            layer.bias = nn.Parameter(bias - excess, requires_grad=False)
        return module(*args, **kwargs)


@torch.no_grad()  # not inference_mode, whose tensors cannot become parameters
def correct_biases(
    prepared: fx.GraphModule, reference: fx.GraphModule, images: torch.Tensor, float_means: dict[str, torch.Tensor]
) -> None:
    """Correct the biases of the calibrated model `prepared` in place, before its conversion.

    Rounding shifts the mean output of a channel. The shift is measured on `images`
    (n, 3, 224, 224) before the activation function, and subtracted from the bias. This is the
    empirical bias correction of Nagel et al. 2019, "Data-Free Quantization Through Weight
    Equalization and Bias Correction" (arXiv:1906.04721), section 4.2 and appendix D.

    `reference` is `prepared` as a quantized graph in float arithmetic; `float_means` are
    `layers.channel_means` of the float network on the same images. All images pass through a layer
    before the next layer runs: 256 images take about 4 GB in ResNet-18.
    """
    _Correcting(reference, float_means).run(images)
    for name in float_means:
        corrected, layer = reference.get_submodule(name), prepared.get_submodule(name)
        layer.bias = nn.Parameter(corrected.bias.detach().clone(), requires_grad=False)
