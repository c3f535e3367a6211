"""Weighted layers, blocks, and the outputs that are watched while images run."""

import pytest
import torch
from torch import nn

from utils import architectures
from utils.catalog import MODELS
from utils.quantize import layers


def test_weighted_layers_are_convolutions_and_linear_layers_in_the_order_of_definition():
    model = nn.Sequential(
        nn.Linear(3, 3),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        nn.ReLU(),
        nn.Linear(3, 2),
    )
    assert list(layers.weighted(model)) == ["0", "1.0", "3"]


EXPECTED = {
    "alexnet": [f"features.{n}" for n in (0, 3, 6, 8, 10)] + [f"classifier.{n}" for n in (1, 4, 6)],
    "resnet18": ["conv1", *(f"layer{n}.{m}" for n in (1, 2, 3, 4) for m in (0, 1)), "fc"],
    "mobilenetv3": [*(f"features.{n}" for n in range(13)), "classifier.0", "classifier.3"],
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_hold_each_weighted_layer_once_in_the_order_of_computation(name):
    model = architectures.build(name).eval()
    blocks = layers.blocks(model)
    assert list(blocks) == EXPECTED[name]
    holders = {
        layer: [block for block in blocks if f"{layer}.".startswith(f"{block}.")]
        for layer in layers.weighted(model)
    }
    assert all(len(names) == 1 for names in holders.values()), holders
    assert {names[0] for names in holders.values()} == set(blocks)  # no block lacks one
    with (
        layers.outputs({block: model.get_submodule(block) for block in blocks}) as outputs,
        torch.inference_mode(),
    ):
        model(torch.zeros(1, 3, 64, 64))
    assert list(outputs) == list(blocks)


class Unit(nn.Sequential):
    """A block of several layers."""


def test_only_plain_sequences_are_taken_apart():
    inner = nn.Sequential(
        nn.ReLU(), Unit(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Linear(1, 1))
    )
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), inner)
    assert layers.blocks(model) == ("1.1", "1.2.0")


class Twice(nn.Module):
    """Computes on one layer twice, then in place."""

    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(2 * torch.eye(2))
            self.second.weight.copy_(-torch.eye(2))

    def forward(self, x):
        return self.second(self.first(self.first(x))).relu_()


@torch.inference_mode()
def test_outputs_are_the_last_ones_in_the_order_of_computation_and_not_changed_in_place():
    model = Twice()
    x = torch.tensor([[1.0, 3.0]])
    with layers.outputs(layers.weighted(model)) as seen:
        assert model(x).tolist() == [[0, 0]]
    assert {name: output.tolist() for name, output in seen.items()} == {
        "first": [[4, 12]],
        "second": [[-4, -12]],
    }
    assert list(seen) == ["first", "second"]
    model(5 * x)
    assert seen["first"].tolist() == [[4, 12]]  # nothing is watched any more


def test_watching_ends_where_the_network_fails():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), layers.outputs(layers.weighted(model)):
        model(torch.zeros(1, 3))
    assert not any(module._forward_hooks for module in model.modules())


@torch.inference_mode()
def test_quantized_outputs_are_given_in_float():
    model = nn.Sequential(nn.Identity())
    x = torch.quantize_per_tensor(torch.tensor([0.5, 1.0]), 0.5, 0, torch.quint8)
    with layers.outputs({"0": model[0]}) as seen:
        model(x)
    assert seen["0"].dtype == torch.float32 and seen["0"].tolist() == [0.5, 1.0]


@torch.no_grad()
def test_channel_moments_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    model[0].weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    model[3].weight.fill_(1.0)
    model[3].bias.zero_()
    images = torch.tensor([0.0, 3.0, 6.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    # Batches of two and one: all images have the same weight.
    moments = layers.channel_moments(model, images.split(2))
    assert moments["0"][0].tolist() == [2 * 3 + 1, -3]  # before the ReLU
    assert moments["3"][0].tolist() == [4 * (1 + 7 + 13) / 3]
    assert moments["0"][1].tolist() == pytest.approx([2 * 6**0.5, 6**0.5])
    assert moments["3"][1].tolist() == pytest.approx([4 * 24**0.5])
    assert not any(module._forward_hooks for module in model.modules())


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)
        self.eval()

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.act(self.bn(self.conv(x)))), 1))


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_overflow_within_the_network_is_counted_even_if_the_answer_is_finite():
    model = Normalized()
    model.conv.weight[0] *= 1e6  # its outputs exceed 65,504, and BatchNorm's next number hides that
    model.bn.weight[0] = 0
    model.fc.weight[:, 0] = 0
    model.half()
    with layers.extremes(model) as report:
        model(IMAGES.half())
        model(IMAGES.half())
    assert report["nonfinite"] > 0
    assert report["largest"] <= 65_504


@torch.inference_mode()
def test_the_largest_value_is_reported_where_it_is():
    model = Normalized()
    with layers.extremes(model) as report:
        model(IMAGES)
        expected = model.conv(2 * IMAGES).abs().max().item()
        model(2 * IMAGES)
    assert report == {"nonfinite": 0, "largest": pytest.approx(expected), "largest_in": "conv"}
