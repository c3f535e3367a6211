"""Where a network is quantized, and in which formats: what a backend asks of the method.

A *pair* is a quantization followed at once by a dequantization: what reads it gets one of few
values. Engines recognise pairs in the exported graph and compute on integers between them. They
differ in where they want pairs, so each backend declares its `QDQConfig`, and the method knows it
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

NARROW = (
    64  # largest magnitude of weights whose products with u8 can be added up by twos in 16 bits
)


@dataclass(frozen=True)
class QDQConfig:
    """The pairs and number formats that a backend asks for.

    Backends with equal placements share one quantized network.
    """

    position: str  # "outputs" of all computing operators, or "inputs" of convolutions and linear layers only
    activation: torch.dtype = torch.uint8
    weight: torch.dtype = torch.int8
    bias: str = "float"  # "float", or "int32" in units of input scale times weight scale
    symmetric: bool = False  # whether the zero-points of activations are 0
    levels: int = 255  # steps between the ends of a calibrated range
    # Activations have a scale for each channel where no reader adds channels up ("apart"), or only
    # where depthwise convolutions read them and `equalize` does not make it needless ("needed"), or
    # nowhere ("tensor").
    scales: str = "tensor"
    rounded_sums: bool = (
        False  # whether additions read rounded numbers; with pairs at "outputs" they always do
    )
    centred: bool = False  # whether nearly symmetric ranges have the middle integer as zero-point, see `calibration.numbers`
    pooling_keeps_scale: bool = False  # whether an average has the scale of what it averages
    float_logits: bool = False  # whether the last operator's output is left as it is
    unit_gates: bool = False  # whether hardsigmoid, which ends at 1, always has the scale 1/256
    narrow: bool = (
        False  # whether products of 8 bits overflow, so that one factor gets 7 bits, see `narrowed`
    )
    narrow_depthwise: bool = (
        False  # whether they overflow in depthwise convolutions, whose weights then get 7 bits
    )
    weight_limit: int | None = (
        None  # largest magnitude of an integer weight, if less than its format has
    )

    @property
    def middle(self) -> int:
        """The zero-point of ranges that reach as far below 0 as above it."""
        return INTEGERS[self.activation][0] + (self.levels + 1) // 2

    def highest_weight(self, layer: nn.Module) -> int:
        """Largest magnitude of a weight of `layer`; the lowest integer is not used, so that 0 is the middle."""
        limits = [
            self.weight_limit,
            NARROW if self.narrow_depthwise and is_depthwise(layer) else None,
        ]
        return min([limit for limit in limits if limit], default=INTEGERS[self.weight][1])

    def narrowed(self, factor: str) -> "QDQConfig":
        """Return the placement in which no product overflows.

        If it is narrow, `factor` is what gets 7 bits: "activations" or "weights". Engines of this
        kind add pairs of products u8 x s8 in 16 bits: 2 x 127 x 127 fits, and so does 2 x 255 x 64.
        Raises `ValueError` for another `factor`.
        """
        change = {"activations": {"levels": 127}, "weights": {"weight_limit": NARROW}}
        if factor not in change:
            raise ValueError(
                f"seven_bits={factor!r} in the recipe: give 'activations' or 'weights'"
            )
        return dataclasses.replace(self, **change[factor]) if self.narrow else self

    def describe(self) -> dict:
        """Return all settings, JSON-serializable."""
        return {name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
                for name, value in vars(self).items()}  # fmt: skip

    @property
    def in_training(self) -> "QDQConfig":
        """The placement that QAT rounds by, of which backends share one training.

        In training, biases are not rounded and logits are. int8 rounds as uint8 does, with
        zero-points lower by 128.
        """
        shifted = self.activation is torch.int8 and not self.symmetric
        activation = torch.uint8 if shifted else self.activation
        return dataclasses.replace(self, bias="float", float_logits=False, activation=activation)

    @classmethod
    def of(cls, settings: dict) -> "QDQConfig":
        """Return the placement that `describe` described."""
        formats = {name: getattr(torch, settings[name]) for name in ("activation", "weight")}
        return cls(**settings | formats)
