"""Bias correction: the means that it matches, and the layers that it leaves alone."""

import pytest
import torch
from helpers import Everything, noise, small
from torch import nn

from utils.quantize import calibration, layers, ptq
from utils.quantize.bias_correction import correct_biases
from utils.quantize.exact import ExactInterpreter
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

OUTPUTS = QDQConfig("outputs")
CONFIGS = [
    OUTPUTS,
    QDQConfig("outputs", torch.int8, bias="int32", steps=127),
    QDQConfig("inputs", scales="needed"),
    QDQConfig("inputs", scales="needed", rounded_sums=True, centred=True),
    QDQConfig("inputs", torch.int8, symmetric=True),
]
RECIPE = Int8(ranges="minmax", calibration_images=32)
CORRECTED = RECIPE.replace(bias_correction=True)
# Layers of Everything with more than one position per image.
SPATIAL = {"stem", "conv", "depthwise", "project"}
IMAGES = noise(32, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


def sequence(*modules):
    torch.manual_seed(2)
    for module in modules:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return nn.Sequential(*modules).eval()


def exactly_rounded(conv: nn.Conv2d) -> nn.Conv2d:
    """Round the weights of `conv`: 16 bits then change them by at most 2^-17 of the largest."""
    with torch.no_grad():
        conv.weight.mul_(2**6).round_().mul_(2**-6)
    return conv


INT16 = QDQConfig("inputs", torch.int16, torch.int16, symmetric=True, steps=2**16 - 1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_compensates_for_a_shifted_weight(bias):
    """If the float weights are larger by `shift`, the mean is larger by shift x mean input."""
    model = sequence(exactly_rounded(nn.Conv2d(3, 2, 1, bias=bias)), nn.ReLU())
    images = noise(8, 4) + torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    result = ptq(model, images, RECIPE, INT16)
    layer = result.layers["0"]
    integers, before = layer.weight.clone(), layer.bias.clone()
    shift = torch.tensor([[0.5, 0.0, 0.0], [0.0, -0.25, 1.0]])
    result.fp32.get_submodule("0").weight.data += shift.view(2, 3, 1, 1)
    correct_biases(result, images)
    assert torch.allclose(layer.bias, before + shift @ images.mean((0, 2, 3)), atol=1e-3)
    assert (layer.bias - before).abs().min() > 0.4
    assert torch.equal(layer.weight, integers)


def test_a_later_layer_reads_the_output_of_corrected_layers():
    model = sequence(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    images = noise(8, 4) + 2
    result = ptq(model, images, RECIPE, INT16)
    before = {name: layer.bias.clone() for name, layer in result.layers.items()}
    result.fp32.get_submodule("0").bias.data += 0.3
    correct_biases(result, images)
    assert torch.allclose(result.layers["0"].bias, before["0"] + 0.3, atol=1e-3)
    # The second layer already reads the corrected mean, so it needs no correction.
    shift = model[1].weight.flatten(1).sum(1) * 0.3
    assert shift.abs().min() > 0.02
    assert torch.allclose(result.layers["1"].bias, before["1"], atol=2e-3)


def mean_errors(result, images):
    """Return the largest shift of a channel's mean between exact and float execution, by layer."""
    moments, errors = layers.channel_moments(result.fp32, [images]), {}

    def look(name, output):
        errors[name] = (layers.mean_by_channel(output) - moments[name][0]).abs().max().item()

    with torch.no_grad():
        ExactInterpreter(result, look).run(images.double())
    return errors


@pytest.mark.parametrize("config", CONFIGS)
def test_after_correction_layers_with_positions_have_the_mean_of_the_float_network(model, config):
    plain, result = ptq(model, IMAGES, RECIPE, config), ptq(model, IMAGES, CORRECTED, config)
    before, after = mean_errors(plain, IMAGES), mean_errors(result, IMAGES)
    assert list(after) == list(before) == list(result.layers)
    for name, layer in result.layers.items():
        if name not in SPATIAL:
            assert torch.equal(layer.bias, plain.layers[name].bias), name
            continue
        step = 0.0
        if config.bias == "int32":
            step = (result.input_scale(name).max() * layer.scale.max()).item()
        assert after[name] <= 1e-6 + 0.51 * step, name
        assert config.bias == "int32" or after[name] < 0.1 * before[name], name


def test_corrected_biases_are_rounded_as_the_configuration_says(model):
    result = ptq(model, IMAGES, CORRECTED, CONFIGS[1])
    for name, layer in result.layers.items():
        step = result.input_scale(name).double() * layer.scale.double()
        assert torch.equal(layer.bias, (layer.bias_integers * step).float())


def test_a_layer_kept_in_fp32_is_not_corrected(model):
    recipe = RECIPE.replace(keep_fp32=("conv", "norm"), bias_correction=True)
    result = ptq(model, IMAGES, recipe, OUTPUTS)
    plain = ptq(model, IMAGES, recipe.replace(bias_correction=False), OUTPUTS)
    assert "conv" not in result.layers
    assert torch.equal(result.network.conv.bias, folded(model).conv.bias)
    assert not torch.equal(result.layers["depthwise"].bias, plain.layers["depthwise"].bias)


def test_the_batch_size_does_not_matter(monkeypatch, model):
    whole = ptq(model, IMAGES, CORRECTED, OUTPUTS)
    monkeypatch.setattr(calibration, "BATCH", 5)
    parts = ptq(model, IMAGES, CORRECTED, OUTPUTS)
    for name, layer in whole.layers.items():
        assert torch.allclose(layer.bias, parts.layers[name].bias, atol=1e-5)


def test_correction_keeps_within_32_bits():
    """Channels with tiny weights: 2^31 of their steps would not reach the bias."""
    model = sequence(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3))
    with torch.no_grad():
        model[2].weight *= torch.tensor([1, 1e-8, 1e-12]).view(-1, 1, 1, 1)
        model[2].bias.copy_(torch.tensor([0.5, 1.0, -2.0]))
    images = noise(16, 8)
    result = ptq(model, images, CORRECTED, QDQConfig("outputs", bias="int32"))
    with torch.no_grad():
        mean = model(images).mean((0, 2, 3))
    assert torch.allclose(result.layers["2"].bias[1:], mean[1:], rtol=1e-5)
