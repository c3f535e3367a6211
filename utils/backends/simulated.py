"""INT16 simulated in FP32, because no engine here has 16-bit integer kernels.

Every weight is one of 65,535 integers and every activation one of 65,536, exactly as on integer
hardware. Only sums are rounded differently: FP32 keeps 24 bits, hardware keeps more. So accuracy
and size are valid for INT16. Speed is not, and is never claimed.
"""

import dataclasses
from pathlib import Path

import torch

from utils.backends import tf32
from utils.backends.base import Lowered, Predictor
from utils.backends.lowering import Lowering
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import QDQConfig

# Symmetric, with 32-bit biases, as in hardware with 16-bit integers. One scale per channel costs
# nothing where channels are not added up: each has a separate accumulator there anyway.
INT16 = QDQConfig(
    "outputs",
    torch.int16,
    torch.int16,
    bias="int32",
    symmetric=True,
    steps=2**16 - 1,
    scales="apart",
)


class Simulated(Lowering):
    """The backend of simulated INT16, on any device that computes in FP32."""

    name, suffix = "simulated", ".int16.pt"
    layout = torch.channels_last
    overflows = False

    def problem(self) -> str | None:
        return None

    def default_config(self, bits: int) -> QDQConfig:
        return INT16

    def lower(self, quantized: Quantized, path: Path) -> None:
        quantized.save(path)

    def deploy(self, quantized: Quantized) -> Lowered:
        network = quantized.network.to(memory_format=torch.channels_last)
        deployed = super().deploy(quantized)
        return dataclasses.replace(deployed, predict=network, network=network)

    def load(self, path: Path, device: str) -> Predictor:
        tf32.forbid(device)  # its mantissa does not hold integers of 16 bits
        return Quantized.load(path).network.to(device, memory_format=torch.channels_last)


ENGINES = {"simulated": Simulated()}
