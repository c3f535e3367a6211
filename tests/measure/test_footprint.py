"""Bytes and operations counted by hand."""

import pytest
import torch
from torch import nn

from utils import architectures
from utils.backends import registry
from utils.backends.base import Stored, stored_parameters
from utils.environment import MIB
from utils.measure import footprint

X = torch.zeros(2, 3, 10, 10)


def live(network, x=X):
    return footprint.activation_mb(network, network, x) * MIB


def test_two_activations_are_alive_at_once():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    ).eval()
    # The convolution's output and ReLU's: 2 x 8 x 10 x 10 floats each; the last has 2 x 4 x 10 x 10.
    assert live(network) == 2 * 6400


def test_in_place_operators_and_views_take_nothing():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten()
    ).eval()
    assert live(network) == 6400


def test_weights_and_the_input_are_not_activations():
    class Passes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000, 1000))

        def forward(self, x):
            return x.detach(), self.weight.detach().t()

    assert live(Passes()) == 0


def test_what_is_freed_is_not_counted_again():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(20):
                x = x + 1
            return x

    assert live(Chain()) == 2 * 2400


class LinearNet(nn.Module):
    """Nearly all of its numbers are in one linear layer, as in AlexNet."""

    architecture = "linear"

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(inplace=True)
        self.fc, self.head = nn.Linear(4 * 8 * 8, 1000), nn.Linear(1000, 2)

    def forward(self, x):
        return self.head(self.fc(torch.flatten(self.relu(self.conv(x)), 1)))


def activations(name, x):
    """Bytes of the activations of a `LinearNet` on an FP16 engine."""
    deployed = registry.get(name).quantize(LinearNet().eval(), None, {})
    return footprint.activation_mb(deployed.predict, deployed.network, x) * MIB


def test_the_fp16_copies_that_autocast_makes_of_weights_are_no_activations():
    """Of each image 2 x 4 x 8 x 8 bytes after the convolution and 2 x 1000 after the linear layer are alive at once.

    What the copies would add: 2 x 256,000 bytes for the weights of the linear layer, 2 x 108 for those of the convolution.
    """
    model = LinearNet().eval()
    assert live(model) == 2 * 4 * (256 + 1000)
    assert activations("amp", X) == 2 * 2 * (
        256 + 1000
    )  # the converted input is gone when the linear layer computes
    assert (
        activations("half", X) == 2 * 2 * (256 + 1000) + 2 * X.numel()
    )  # here it is held until the network has answered


def test_one_image_takes_autocast_no_more_than_fp32():
    model = architectures.build("alexnet").eval()
    x = torch.zeros(1, 3, 224, 224)
    full = footprint.activation_mb(model, model, x)
    for name in ("amp", "half"):
        deployed = registry.get(name).quantize(model, None, {})
        less = footprint.activation_mb(deployed.predict, deployed.network, x)
        assert less < 0.85 * full, name  # the input, converted, counts too


# ---- the numbers in a file


def of_numbers(deployed):
    return footprint.of_numbers(deployed.stored)


def test_numbers_by_hand():
    stored = [Stored(100, 8, "conv"), Stored(10, 32), Stored(40, 32, "fc"), Stored(6, 16)]
    assert footprint.of_numbers(iter(stored)) == {
        "theoretical_mb": (100 + 4 * 10 + 4 * 40 + 2 * 6) / MIB,
        "parameters": 156,
        "weight_modules": 2,
        "quantized_modules": 1,
        "quantized_share": 106 / 156,
    }


class Mixed(nn.Module):
    """Weights 8 x 3 x 9 + 2 x 8, biases 2, BatchNorm 2 x 8."""

    architecture = "mixed"

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.relu(self.bn(self.conv(x)))), 1))


WEIGHTS, BIASES, NORM = 8 * 3 * 9 + 2 * 8, 2, 2 * 8
FOLDED = 8  # biases that BatchNorm becomes
INT8 = dict(bits=8, activations="minmax", bias_correction=False, keep_fp32=())
INT16 = dict(bits=16, activations="minmax", headroom=4.0)


@pytest.mark.parametrize(
    ("name", "recipe", "parameters", "size", "modules", "quantized"),
    [
        (
            "half",
            {},
            WEIGHTS + BIASES + NORM,
            2 * (WEIGHTS + BIASES + NORM),
            2,
            WEIGHTS + BIASES + NORM,
        ),
        (
            "amp",
            {},
            WEIGHTS + BIASES + NORM,
            4 * (WEIGHTS + BIASES + NORM),
            0,
            0,
        ),  # FP32 in the file, however it is run
        ("fbgemm", INT8, WEIGHTS + BIASES + FOLDED, WEIGHTS + 4 * (BIASES + FOLDED), 2, WEIGHTS),
        ("qnnpack", INT8, WEIGHTS + BIASES + FOLDED, WEIGHTS + 4 * (BIASES + FOLDED), 2, WEIGHTS),
        (
            "onnxruntime",
            INT8,
            WEIGHTS + BIASES + FOLDED,
            WEIGHTS + 4 * (BIASES + FOLDED),
            2,
            WEIGHTS,
        ),
        (
            "fbgemm",
            INT8 | dict(keep_fp32=("fc",)),
            WEIGHTS + BIASES + FOLDED,
            216 + 4 * (16 + BIASES + FOLDED),
            1,
            216,
        ),
        (
            "simulated",
            INT16,
            WEIGHTS + BIASES + FOLDED,
            2 * WEIGHTS + 4 * (BIASES + FOLDED),
            2,
            WEIGHTS,
        ),
    ],
)
def test_the_same_definition_for_every_engine(name, recipe, parameters, size, modules, quantized):
    deployed = registry.get(name).quantize(Mixed().eval(), torch.randn(2, 3, 10, 10), recipe)
    assert of_numbers(deployed) == {
        "theoretical_mb": size / MIB,
        "parameters": parameters,
        "weight_modules": 2,
        "quantized_modules": modules,
        "quantized_share": quantized / parameters,
    }


def test_fp32_by_the_same_definition():
    assert footprint.of_numbers(stored_parameters(Mixed())) == {
        "theoretical_mb": 4 * (WEIGHTS + BIASES + NORM) / MIB,
        "parameters": WEIGHTS + BIASES + NORM,
        "weight_modules": 2,
        "quantized_modules": 0,
        "quantized_share": 0,
    }


def test_alexnet_has_the_megabytes_of_the_dissertation():
    model = architectures.build("alexnet").eval()
    assert (
        footprint.of_numbers(stored_parameters(model))["theoretical_mb"]
        == 4 * 57_012_034 / MIB
        == pytest.approx(217.5, abs=0.05)
    )
    half = registry.get("half").quantize(model, None, {})
    assert of_numbers(half)["theoretical_mb"] == 2 * 57_012_034 / MIB


def test_the_size_of_a_file_is_in_mib(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (MIB + MIB // 2))
    assert footprint.size_mb(tmp_path / "file") == 1.5


def test_macs_of_alexnet_are_those_that_are_published():
    # torchvision's documentation gives 0.71 GFLOPS for 1000 classes, each multiply-accumulate counted once.
    macs = footprint.macs(architectures.build("alexnet"))
    assert abs(sum(macs.values()) + 4096 * 998 - 0.71e9) < 0.01e9
    assert macs["classifier.1"] == 9216 * 4096 and macs["features.0"] == 64 * 3 * 11 * 11 * 55 * 55


def test_the_share_of_operations_is_that_of_layers_with_short_weights():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.MaxPool2d(224), nn.Flatten(), nn.Linear(4, 2, bias=False)
    )
    numbers = [Stored(12, 8, "0"), Stored(4, 8), Stored(8, 32, "3")]
    assert footprint.of_operations(model, numbers) == {
        "macs": 12 * 224 * 224 + 8, "quantized_macs_share": 12 * 224 * 224 / (12 * 224 * 224 + 8),
    }  # fmt: skip
    assert (
        footprint.of_operations(model, [Stored(12, 32, "0"), Stored(8, 32, "3")])[
            "quantized_macs_share"
        ]
        == 0
    )
