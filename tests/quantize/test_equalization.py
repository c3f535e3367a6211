"""Equalization: the same function, in which depthwise layers read equal channel ranges."""

import copy
import functools

import pytest
import torch
from helpers import Outlier, SmallDepthwise, noise, small, sqnr_db, uneven_images
from torch import nn

from utils.quantize import equalization, ptq
from utils.quantize.equalization import Place, equalize, factors, places
from utils.quantize.exact import execute
from utils.quantize.modules import quantize_weight
from utils.quantize.network import Quantized
from utils.quantize.operators import ScaledHardswish, folded
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

OUTPUTS, INPUTS = QDQConfig("outputs"), QDQConfig("inputs")
RECIPE = Int8(ranges="minmax", calibration_images=40)


class Uneven(nn.Module):
    """A convolution with uneven channels, an activation, and an equalizing depthwise layer."""

    def __init__(self, activation, uneven=(1.0, 3.0, 10.0, 30.0)):
        super().__init__()
        self.stem, self.activation, self.depthwise = (
            nn.Conv2d(3, 4, 3),
            activation(),
            nn.Conv2d(4, 4, 3, groups=4),
        )
        equalization.divide(self.stem, 1 / torch.tensor(uneven))
        equalization.multiply(self.depthwise, 1 / torch.tensor(uneven))

    def forward(self, x):
        return self.depthwise(self.activation(self.stem(x)))


class Twice(SmallDepthwise):
    """The depthwise convolution is not the only reader of the stem."""

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.flatten(self.pool(self.pointwise(self.depthwise(x) + x)), 1))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Identity])
@torch.no_grad()
def test_channels_have_one_range_afterwards_and_weights_the_same_integers(activation):
    model, images = small(functools.partial(Uneven, activation)), noise(8, 12)
    network = folded(model)
    done = equalize(network, images, OUTPUTS, RECIPE)
    assert done == {"depthwise"}
    assert not any(isinstance(module, ScaledHardswish) for module in network.modules())
    assert torch.allclose(network(images), model(images), rtol=1e-5, atol=1e-5)
    read = network.stem(images).relu() if activation is nn.ReLU else network.stem(images)
    ends = (
        read.transpose(0, 1).flatten(1).amax(1),
        -read.transpose(0, 1).flatten(1).amin(1) / equalization.LOW,
    )
    reach = torch.maximum(*ends)
    assert torch.allclose(reach, reach.max().expand(4), rtol=1e-4)
    for name in ("stem", "depthwise"):
        before, _ = quantize_weight(model.get_submodule(name).weight, 127)
        after, _ = quantize_weight(network.get_submodule(name).weight, 127)
        assert torch.equal(before, after)


def test_factors_are_those_computed_by_hand():
    low, high = torch.tensor([0.0, -1.0, -4.0, 0.0]), torch.tensor([8.0, 4.0, 2.0, 0.0])
    # Reaches are 8, 4, 4 / LOW = 8 and 0, which gets the smallest factor.
    assert factors((low, high)).tolist() == [1.0, 0.5, 1.0, equalization.SMALLEST]


@torch.no_grad()
def test_an_outlier_channel_before_hardswish_does_not_coarsen_the_others():
    model, images = small(Outlier), uneven_images()
    for config in (OUTPUTS, INPUTS):
        plain = ptq(model, images, RECIPE, config)
        equalized = ptq(model, images, RECIPE.replace(equalize=True), config)
        assert sqnr_db(model(images), execute(plain, images)) < 10
        assert sqnr_db(model(images), execute(equalized, images)) > 25
        assert sqnr_db(model(images), equalized.fp32(images)) > 100  # the same function
        modules = equalized.network.modules()
        (scaled,) = (module for module in modules if isinstance(module, ScaledHardswish))
        # With pairs at inputs, nothing rounds what hardswish reads.
        assert bool((scaled.before == 1).all()) == (config is INPUTS)


class Mixed(nn.Module):
    """Depthwise layers after ReLU, and after hardswish with and without a large channel."""

    def __init__(self):
        super().__init__()
        self.exact, self.outlier, self.calm = (
            Uneven(nn.ReLU),
            Outlier(),
            Uneven(nn.Hardswish, (1.0, 1.0, 2.0, 2.0)),
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.exact(x) + self.calm(x)), 1)) + self.outlier(x)


@torch.no_grad()
def test_a_scale_for_each_channel_stays_only_where_no_factor_replaces_it(tmp_path):
    model, images = small(Mixed), uneven_images()
    mixed = ptq(model, images, RECIPE.replace(equalize=True), QDQConfig("inputs", scales="needed"))
    layers = ("exact.depthwise", "outlier.depthwise", "calm.depthwise")
    assert [mixed.input_scale(name).numel() for name in layers] == [1, 8, 4]
    assert not any(isinstance(module, ScaledHardswish) for module in mixed.network.modules())
    plain = folded(model)
    changed = [
        not torch.equal(mixed.fp32.get_submodule(name).weight, plain.get_submodule(name).weight)
        for name in layers
    ]
    assert changed == [True, False, False]
    assert sqnr_db(model(images), mixed.fp32(images)) > 100  # the same function
    # One scale costs nothing after ReLU, and nearly everything after hardswish.
    everywhere = ptq(model, images, RECIPE, QDQConfig("inputs", scales="needed"))
    assert len(everywhere.qdqs.channelwise) == 3
    nowhere = ptq(model, images, RECIPE, INPUTS)
    networks = (mixed, everywhere, nowhere)
    values = [sqnr_db(model(images), execute(network, images)) for network in networks]
    assert abs(values[0] - values[1]) < 1 and values[0] > values[2] + 15
    mixed.save(tmp_path / "q.pt")
    loaded = Quantized.load(tmp_path / "q.pt", model)
    assert loaded.digest() == mixed.digest() and loaded.qdqs == mixed.qdqs


@torch.no_grad()
def test_hardswish_is_left_alone_where_one_scale_is_enough():
    network = folded(small(functools.partial(Uneven, nn.Hardswish, (1.0, 1.0, 2.0, 2.0))))
    before = copy.deepcopy(network.state_dict())
    assert [(place.activation, place.exact) for place in places(network, ())] == [
        ("activation", False)
    ]
    assert equalize(network, noise(16, 33), OUTPUTS, RECIPE) == {"depthwise"}
    assert not any(isinstance(module, ScaledHardswish) for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_places_are_depthwise_convolutions_that_alone_read_another_layer():
    assert places(folded(small(SmallDepthwise)), ()) == [
        Place("stem.0", "stem.2", "depthwise.0", exact=True)
    ]
    # Layers that stay in FP32 are not changed.
    assert places(folded(small(SmallDepthwise)), ("stem",)) == []
    assert places(folded(small(Twice)), ()) == []


@torch.no_grad()
def test_an_equalized_network_is_saved_and_loaded(tmp_path):
    model, images = small(Outlier), uneven_images()
    saved = ptq(model, images, RECIPE.replace(equalize=True), OUTPUTS)
    saved.save(tmp_path / "q.pt")
    loaded = Quantized.load(tmp_path / "q.pt", small(Outlier))
    assert loaded.digest() == saved.digest()
    assert torch.equal(execute(loaded, images), execute(saved, images))
