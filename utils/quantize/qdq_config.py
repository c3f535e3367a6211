"""Q/DQ configuration: where an engine wants a network quantized, and in which formats.

A *Q/DQ pair* is a quantization followed at once by a dequantization: its readers get one of few
values. Engines recognise the pairs in the exported graph and compute on integers between them. They
want pairs in different places, so each backend declares its `QDQConfig`, and the method knows it
before it chooses ranges and corrects biases.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from utils.quantize.layers import is_depthwise

INTEGERS = {  # lowest, highest
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.uint16: (0, 2**16 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
}

# Kernels without VNNI add products u8 x s8 by twos in 16 bits. 2 x 255 x 64 fits, and so does
# 2 x 127 x 127.
NARROW_WEIGHT = 64  # largest magnitude of a weight of 7 bits
NARROW_STEPS = 127  # between the ends of a range of activations of 7 bits


@dataclass(frozen=True)
class QDQConfig:
    """The positions of Q/DQ pairs and the number formats that a backend asks for.

    Backends with equal configurations share one quantized network.
    """

    # Pairs at the "outputs" of all operators, or at the "inputs" of convolutions and linear layers.
    position: str
    activation: torch.dtype = torch.uint8
    weight: torch.dtype = torch.int8
    bias: str = "float"  # "float", or "int32" in units of input scale times weight scale
    symmetric: bool = False  # zero-points of activations are 0
    steps: int = 255  # between the ends of a calibrated range
    # One scale for an activation ("tensor"), or one per channel: wherever no reader adds channels
    # ("apart"), or only where a depthwise convolution reads it and `equalize` cannot make one scale
    # enough ("needed").
    scales: str = "tensor"
    rounded_sums: bool = False  # additions read quantized values; at "outputs" they always do
    centred: bool = False  # nearly symmetric ranges get the middle integer as zero-point
    pooling_keeps_scale: bool = False  # an average has the scale of its input
    float_logits: bool = False  # the output of the last operator is not quantized
    unit_gates: bool = False  # hardsigmoid, which ends at 1, always has the scale 1/256
    # Layers in which sums of 8-bit products overflow: "none", "depthwise" or "all".
    overflow: str = "none"
    # The factor with 7 bits in these layers: "none", "activations" or "weights".
    overflow_fix: str = "none"

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest integer of an activation: `steps` apart, or all of the type.

        With 7 bits, values beyond the range must not become integers of 8 bits, which overflow.
        """
        lowest, highest = INTEGERS[self.activation]
        return (lowest, highest) if self.symmetric else (lowest, min(highest, lowest + self.steps))

    @property
    def middle(self) -> int:
        """The zero-point of ranges that reach as far below 0 as above it."""
        return INTEGERS[self.activation][0] + (self.steps + 1) // 2

    def highest_weight(self, layer: nn.Module) -> int:
        """Return the largest magnitude of a weight of `layer`.

        The lowest integer is not used, so 0 is the middle.
        """
        overflows = self.overflow == "all" or (self.overflow == "depthwise" and is_depthwise(layer))
        if overflows and self.overflow_fix == "weights":
            return NARROW_WEIGHT
        return INTEGERS[self.weight][1]

    def fixed(self, overflow_fix: str, portable: bool = False) -> "QDQConfig":
        """Return the configuration with `overflow_fix`, a value of that field of `recipes.Int8`.

        If it is `portable`, it applies on every processor. If only depthwise layers overflow, their
        weights get 7 bits, because other layers may also read their inputs.
        """
        overflow = "all" if portable else self.overflow
        if overflow == "none" or overflow_fix == "none":
            return self
        if overflow == "depthwise":
            return dataclasses.replace(self, overflow_fix="weights")
        steps = NARROW_STEPS if overflow_fix == "activations" else self.steps
        return dataclasses.replace(self, overflow=overflow, overflow_fix=overflow_fix, steps=steps)

    def describe(self) -> dict:
        """Return all fields, JSON-serializable."""
        formats = {"activation": self.activation, "weight": self.weight}
        return vars(self) | {
            name: str(dtype).removeprefix("torch.") for name, dtype in formats.items()
        }

    @property
    def in_training(self) -> "QDQConfig":
        """The configuration of QAT, shared by all backends that differ only in what it replaces.

        In training, biases are not rounded, but logits are. int8 rounds like uint8, with
        zero-points lower by 128.
        """
        shifted = self.activation is torch.int8 and not self.symmetric
        activation = torch.uint8 if shifted else self.activation
        return dataclasses.replace(self, bias="float", float_logits=False, activation=activation)

    @classmethod
    def of(cls, settings: dict) -> "QDQConfig":
        """Return the configuration that `describe` returned as `settings`."""
        formats = {name: getattr(torch, settings[name]) for name in ("activation", "weight")}
        return cls(**settings | formats)
