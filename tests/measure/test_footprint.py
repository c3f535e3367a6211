"""Bytes and operations, counted by hand."""

import pytest
import torch
from helpers import deployed_on
from torch import nn

from utils import architectures
from utils.backends.base import Stored, stored_parameters
from utils.environment import MIB
from utils.measure import footprint
from utils.recipes import Fp16, Int8, Int16

X = torch.zeros(2, 3, 10, 10)


def live(network, x=X):
    return footprint.activation_mb(network, network, x) * MIB


class Views(nn.Module):
    """Views of the input and of a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000, 1000))

    def forward(self, x):
        return x.detach(), self.weight.detach().t()


class Chain(nn.Module):
    """Twenty sums; after each, the input of the sum is freed."""

    def forward(self, x):
        for _ in range(20):
            x = x + 1
        return x


def test_two_activations_are_alive_at_once():
    first, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
    network = nn.Sequential(first, nn.ReLU(), last).eval()
    # The outputs of the first convolution and of ReLU have 2 x 8 x 10 x 10 floats each, the output
    # of the last convolution 2 x 4 x 10 x 10.
    assert live(network) == 2 * 6400


def test_in_place_operators_and_views_take_no_memory():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert live(nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten()).eval()) == 6400


def test_weights_and_the_input_are_not_activations():
    assert live(Views()) == 0


def test_freed_activations_no_longer_count():
    assert live(Chain()) == 2 * 2400


class LinearNet(nn.Module):
    """A network with nearly all of its numbers in one linear layer, as in AlexNet."""

    architecture = "linear"

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(inplace=True)
        self.fc, self.head = nn.Linear(4 * 8 * 8, 1000), nn.Linear(1000, 2)

    def forward(self, x):
        return self.head(self.fc(torch.flatten(self.relu(self.conv(x)), 1)))


def activations(name, x):
    """Bytes of the activations of a `LinearNet` on an FP16 engine."""
    deployed = deployed_on(name, LinearNet().eval(), None, Fp16())
    return footprint.activation_mb(deployed.predict, deployed.network, x) * MIB


def test_fp16_copies_of_weights_are_not_activations():
    """Two outputs are alive at once: per image, 4 x 8 x 8 numbers of `conv` and 1000 of `fc`.

    Autocast's copies of the weights have 256,000 numbers for `fc` and 108 for `conv`.
    """
    model = LinearNet().eval()
    assert live(model) == 2 * 4 * (256 + 1000)
    # Autocast frees the converted input before `fc` runs; `half` holds it until the end.
    assert activations("amp", X) == 2 * 2 * (256 + 1000)
    assert activations("half", X) == 2 * 2 * (256 + 1000) + 2 * X.numel()


def test_one_image_takes_less_memory_in_fp16_than_in_fp32():
    model = architectures.build("alexnet").eval()
    x = torch.zeros(1, 3, 224, 224)
    full = footprint.activation_mb(model, model, x)
    for name in ("amp", "half"):
        deployed = deployed_on(name, model, None, Fp16())
        less = footprint.activation_mb(deployed.predict, deployed.network, x)
        assert less < 0.85 * full, name  # more than half, because the converted input also counts


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
    """A network with 8 x 3 x 9 + 2 x 8 weights, 2 biases and 2 x 8 numbers of BatchNorm."""

    architecture = "mixed"

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.relu(self.bn(self.conv(x)))), 1))


CONV, FC, BIASES, NORM = 8 * 3 * 9, 2 * 8, 2, 2 * 8
WEIGHTS = CONV + FC
FLOAT = WEIGHTS + BIASES + NORM
FOLDED = BIASES + 8  # BatchNorm becomes 8 biases
INT8 = Int8(ranges="minmax", calibration_images=2)
FC_IN_FP32 = INT8.replace(keep_fp32=("fc",))
INT16 = Int16(ranges="minmax", calibration_images=2, headroom=4.0)


@pytest.mark.parametrize(
    ("name", "recipe", "parameters", "size", "modules", "quantized"),
    [
        ("half", Fp16(), FLOAT, 2 * FLOAT, 2, FLOAT),
        ("amp", Fp16(), FLOAT, 4 * FLOAT, 0, 0),  # the file holds FP32
        ("fbgemm", INT8, WEIGHTS + FOLDED, WEIGHTS + 4 * FOLDED, 2, WEIGHTS),
        ("qnnpack", INT8, WEIGHTS + FOLDED, WEIGHTS + 4 * FOLDED, 2, WEIGHTS),
        ("onnxruntime", INT8, WEIGHTS + FOLDED, WEIGHTS + 4 * FOLDED, 2, WEIGHTS),
        ("fbgemm", FC_IN_FP32, WEIGHTS + FOLDED, CONV + 4 * (FC + FOLDED), 1, CONV),
        ("simulated", INT16, WEIGHTS + FOLDED, 2 * WEIGHTS + 4 * FOLDED, 2, WEIGHTS),
    ],
)
def test_the_same_definition_for_every_engine(name, recipe, parameters, size, modules, quantized):
    deployed = deployed_on(name, Mixed().eval(), torch.randn(2, 3, 10, 10), recipe)
    assert of_numbers(deployed) == {
        "theoretical_mb": size / MIB,
        "parameters": parameters,
        "weight_modules": 2,
        "quantized_modules": modules,
        "quantized_share": quantized / parameters,
    }


def test_fp32_by_the_same_definition():
    assert footprint.of_numbers(stored_parameters(Mixed())) == {
        "theoretical_mb": 4 * FLOAT / MIB,
        "parameters": FLOAT,
        "weight_modules": 2,
        "quantized_modules": 0,
        "quantized_share": 0,
    }


def test_alexnet_has_the_megabytes_of_the_dissertation():
    model = architectures.build("alexnet").eval()
    size_mb = footprint.of_numbers(stored_parameters(model))["theoretical_mb"]
    assert size_mb == 4 * 57_012_034 / MIB == pytest.approx(217.5, abs=0.05)
    half = deployed_on("half", model, None, Fp16())
    assert of_numbers(half)["theoretical_mb"] == 2 * 57_012_034 / MIB


def test_the_size_of_a_file_is_in_mib(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (MIB + MIB // 2))
    assert footprint.size_mb(tmp_path / "file") == 1.5


def test_macs_of_alexnet_equal_the_published_number():
    # torchvision's documentation gives 0.71 GFLOPS for 1000 classes: one per multiply-accumulate.
    macs = footprint.macs(architectures.build("alexnet"))
    assert abs(sum(macs.values()) + 4096 * 998 - 0.71e9) < 0.01e9
    assert macs["classifier.1"] == 9216 * 4096 and macs["features.0"] == 64 * 3 * 11 * 11 * 55 * 55


def test_the_share_of_operations_counts_layers_with_short_weights():
    conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 2, bias=False)
    model = nn.Sequential(conv, nn.MaxPool2d(224), nn.Flatten(), linear)
    macs = 12 * 224 * 224
    numbers = [Stored(12, 8, "0"), Stored(4, 8), Stored(8, 32, "3")]
    assert footprint.of_operations(model, numbers) == {
        "macs": macs + 8,
        "quantized_macs_share": macs / (macs + 8),
    }
    fp32 = [Stored(12, 32, "0"), Stored(8, 32, "3")]
    assert footprint.of_operations(model, fp32)["quantized_macs_share"] == 0
