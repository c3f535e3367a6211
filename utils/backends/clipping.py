"""Clipping of activations to 7 bits, for engines whose quantization clips to 8 bits.

Engines quantize to all integers of u8 and ignore narrower limits of a Q/DQ pair. So values beyond
a calibrated range would get integers above 127, and products that overflow 16 bits. A separate
operator clips them. OpenVINO fuses it before the quantization. ONNX Runtime and Inductor recognise
a layer with its quantization only if nothing stands between them, so there it comes afterwards.
"""

import copy

import torch
from torch import fx, nn

from utils.quantize.decomposed_ops import OPS
from utils.quantize.modules import QDQ, along_channels
from utils.quantize.qdq_config import INTEGERS


class Integers(nn.Module):
    """A `QDQ` that clips its integers after quantization, in a separate operator."""

    def __init__(self, qdq: QDQ):
        super().__init__()
        self.high = qdq.limits[1]
        self.how = (*qdq.numbers, *INTEGERS[qdq.dtype], qdq.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        integers = OPS.quantize_per_tensor.default(x, *self.how).clamp(max=self.high)
        return OPS.dequantize_per_tensor.default(integers, *self.how)


class Values(nn.Module):
    """A `QDQ` that clips the values it reads before quantization, in a separate operator."""

    def __init__(self, qdq: QDQ):
        super().__init__()
        low, high = (limit - qdq.zero_point.double() for limit in qdq.limits)
        self.register_buffer("low", (low * qdq.scale.double()).float())
        self.register_buffer("high", (high * qdq.scale.double()).float())
        self.ends = (self.low.item(), self.high.item()) if qdq.numbers else None
        self.qdq = QDQ(qdq.dtype)
        self.qdq.assign(qdq.scale, qdq.zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = self.ends or (along_channels(self.low, x), along_channels(self.high, x))
        return self.qdq(torch.clamp(x, *ends))


def clipped(network: fx.GraphModule, form: type[Integers] | type[Values]) -> fx.GraphModule:
    """Copy a quantized `network` with `form` in place of each pair with limits below its type's.

    `Integers` leaves out pairs with a scale for each channel.
    """
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        narrow = isinstance(module, QDQ) and module.limits != INTEGERS[module.dtype]
        if narrow and (module.numbers or form is Values):
            network.set_submodule(name, form(module))
    return network
