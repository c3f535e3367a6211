"""Repairing what rounding the weights does to a network, without training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import fx, nn


class _Correcting(fx.Interpreter):
    """Runs a quantized graph once and sets every weighted layer's bias so that its mean output is the float one.

    Layers are met in the order of computation, so each sees inputs from layers that are corrected already.
    """

    def __init__(self, reference: fx.GraphModule, float_means: dict[str, torch.Tensor]):
        super().__init__(reference)
        self.float_means = float_means

    def call_module(self, target, args, kwargs):
        module = self.fetch_attr(target)
        fused = isinstance(module, nn.Sequential)  # convolution and activation in one: only the former is corrected
        layer, name = (module[0], f"{target}.0") if fused else (module, target)
        if name in self.float_means:
            excess = _channel_means(layer(*args)) - self.float_means[name]
            bias = torch.zeros_like(excess) if layer.bias is None else layer.bias
            layer.bias = nn.Parameter(bias - excess, requires_grad=False)
        return module(*args, **kwargs)


@torch.no_grad()  # not inference_mode: its tensors could not become parameters
def biases(
    prepared: fx.GraphModule, reference: fx.GraphModule, images: torch.Tensor, float_means: dict[str, torch.Tensor]
) -> None:
    """Correct the biases of a calibrated model in place, so that converting it gives the corrected quantized model.

    Rounding shifts the mean output of a channel; the shift is measured on `images` (n, 3, 224, 224) and subtracted from the
    bias: the empirical bias correction of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, section 4.2 and appendix D, before the activation function. `float_means` are `channel_means` of the
    float network on the same images; `reference` is `prepared` as a quantized graph in float arithmetic. All images go
    through a layer before the next one: 256 of them take about 4 GB in ResNet-18.
    """
    _Correcting(reference, float_means).run(images)
    for name in float_means:
        corrected, layer = reference.get_submodule(name), prepared.get_submodule(name)
        layer.bias = nn.Parameter(corrected.bias.detach().clone(), requires_grad=False)


@contextlib.contextmanager
def channel_means(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Collect, while images run through `model`, the mean output of each channel of each convolution and linear layer.

    Means are taken before the activation function, over images and positions. The yielded dict is filled on leaving.
    """
    sums: dict[str, torch.Tensor] = {}
    means: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, output: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + _channel_means(output) * len(output)
        counts[name] = counts.get(name, 0) + len(output)

    hooks = [
        module.register_forward_hook(lambda _module, _input, output, name=name: add(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()
        means.update({name: total / counts[name] for name, total in sums.items()})


def _channel_means(output: torch.Tensor) -> torch.Tensor:
    return output.mean(dim=[d for d in range(output.ndim) if d != 1])
