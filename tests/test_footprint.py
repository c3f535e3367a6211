"""`utils.footprint`: bytes and operations counted by hand."""

import torch
from torch import nn

from utils import architectures, backends, footprint

X = torch.zeros(2, 3, 10, 10)


def live(network, x=X):
    return footprint.activation_mb(network, network, x) * footprint.MIB


def test_two_activations_are_alive_at_once():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    # The convolution's output and ReLU's: 2 x 8 x 10 x 10 floats each; the last has 2 x 4 x 10 x 10.
    assert live(network) == 2 * 6400


def test_in_place_operators_and_views_take_nothing():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten()).eval()
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


def test_half_precision_halves_the_activations():
    model = architectures.build("alexnet").eval()
    x = torch.zeros(1, 3, 224, 224)
    half = backends.get("half").quantize(model, x, {})
    full = footprint.activation_mb(model, model, x)
    whole = footprint.activation_mb(half.predict, half.network, x)
    assert whole < 0.85 * full  # the input, converted, counts too


def test_theoretical_bytes_are_numbers_times_their_width():
    model = architectures.build("alexnet").eval()
    x = torch.zeros(2, 3, 224, 224)
    numbers = 57_012_034
    biases = sum(module.bias.numel() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    int8 = dict(weights="per_channel_symmetric", activations="minmax", bias_correction=False, keep_fp32=())
    expected = {
        ("half", ()): 2 * numbers,
        ("amp", ()): 4 * numbers,
        ("fbgemm", tuple(int8.items())): (numbers - biases) + 4 * biases,
        ("simulated", (("activations", "minmax"), ("headroom", 4.0))): 2 * (numbers - biases) + 4 * biases,
    }
    for (name, recipe), size in expected.items():
        deployed = backends.get(name).quantize(model, x, dict(recipe))
        assert deployed.weight_bytes == size, name
        assert deployed.parameters == numbers


def test_macs_of_alexnet_are_those_that_are_published():
    # torchvision's documentation gives 0.71 GFLOPS for 1000 classes, each multiply-accumulate counted once.
    macs = footprint.macs(architectures.build("alexnet"))
    assert abs(macs + 4096 * 998 - 0.71e9) < 0.01e9
