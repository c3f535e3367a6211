"""The networks that recipes give stay the same to the last bit when the code is rearranged.

All numbers of this small network are multiples of powers of 2, so its sums are exact, and every
processor gives the same integers, scales and zero-points. The digests are from commit 06c9c7d,
before recipes had types, except "narrow": since then, its integers end at 127.
"""

import hashlib

import pytest
import torch
from torch import nn

from utils.quantize import ptq
from utils.quantize.exact import execute
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

CONFIGS = {
    "torch": QDQConfig("outputs", pooling_keeps_scale=True, unit_gates=True),
    "narrow": QDQConfig("outputs", overflow="all").fixed("activations"),
    "narrow weights": QDQConfig("outputs", overflow="all").fixed("weights"),
    "depthwise": QDQConfig("outputs", overflow="depthwise").fixed("activations"),
    "onnxruntime": QDQConfig("outputs", bias="int32", float_logits=True),
    "openvino": QDQConfig("inputs", scales="needed", rounded_sums=True, centred=True),
    "tensorrt": QDQConfig("inputs", activation=torch.int8, symmetric=True),
    "int16": QDQConfig(
        "outputs",
        torch.int16,
        torch.int16,
        bias="int32",
        symmetric=True,
        steps=2**16 - 1,
        scales="apart",
    ),
}
RECIPES = {
    "plain": dict(),
    "tensor": dict(weight_scales="tensor"),
    "equalized": dict(equalize=True, headroom=2.0),
    "in part": dict(keep_fp32=("depthwise",), bias_correction=True),
}
EXPECTED = {
    ("plain", "torch"): "4cf6bcc1f7116b7d",
    ("plain", "narrow"): "5ad4466fe62d11bd",
    ("plain", "narrow weights"): "32f4816ad230b8a4",
    ("plain", "depthwise"): "d3c3bcfc176ffc3a",
    ("plain", "onnxruntime"): "1060497bdc999ba6",
    ("plain", "openvino"): "2228ab4e2e89e49a",
    ("plain", "tensorrt"): "bcc05412146e0cb0",
    ("plain", "int16"): "62ef24a6059bed0d",
    ("tensor", "torch"): "788ac85df749f277",
    ("tensor", "narrow"): "e05f7cc83dce8f81",
    ("tensor", "narrow weights"): "5c9ffba80554ae0d",
    ("tensor", "depthwise"): "f6ba0ec7b4e2cdab",
    ("tensor", "onnxruntime"): "9e505db8d0562d80",
    ("tensor", "openvino"): "1736115621767276",
    ("tensor", "tensorrt"): "a4292b572fd99a34",
    ("tensor", "int16"): "39ed87ea71834f2d",
    ("equalized", "torch"): "5b0d81dc9b4a96fb",
    ("equalized", "narrow"): "00dc435652701dd3",
    ("equalized", "narrow weights"): "29138e6d927083ab",
    ("equalized", "depthwise"): "a716821345ff8b5b",
    ("equalized", "onnxruntime"): "30638cb782ffc16f",
    ("equalized", "openvino"): "9b887213204c5964",
    ("equalized", "tensorrt"): "d7b22c95a61d34d9",
    ("equalized", "int16"): "4f41f47e99fc89a8",
    ("in part", "torch"): "46504ef5b3bbfe1b",
    ("in part", "narrow"): "de3684d95b64bf22",
    ("in part", "narrow weights"): "26095bfbd2504bce",
    ("in part", "depthwise"): "46504ef5b3bbfe1b",
    ("in part", "onnxruntime"): "fe02bcf53f515cc5",
    ("in part", "openvino"): "251012c7b1d6c41f",
    ("in part", "tensorrt"): "62b42042b2d26fc5",
    ("in part", "int16"): "76f148a9ffd30e9f",
}


def dyadic(shape, seed, size=64):
    """Random multiples of 1/16 from -size/16 to size/16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-size, size + 1, shape, generator=generator) / 16


class Dyadic(nn.Module):
    """A convolution, ReLU, a depthwise one, ReLU, a sum, max pooling and a linear layer."""

    architecture = "dyadic"

    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.depthwise, self.relu2 = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU()
        self.pool, self.flatten, self.head = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = dyadic(parameter.shape, seed, 16)

    def forward(self, x):
        x = self.relu(self.stem(x))
        return self.head(self.flatten(self.pool(self.relu2(self.depthwise(x)) + x)))


def digest(network: nn.Module, answers: torch.Tensor) -> str:
    """Return 16 digits of all tensors of a quantized network and of its exact answers."""
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.contiguous().numpy().tobytes())
    total.update(answers.float().numpy().tobytes())
    return total.hexdigest()[:16]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_the_same_network_as_ever(recipe, config):
    images = dyadic((16, 3, 8, 8), 99)
    chosen = Int8(ranges="minmax", calibration_images=16, **RECIPES[recipe])
    quantized = ptq(Dyadic().eval(), images, chosen, CONFIGS[config])
    found = digest(quantized.network, execute(quantized, images))
    assert found == EXPECTED[recipe, config]
