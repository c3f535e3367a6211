"""Post-training quantization: errors, weights, layers in FP32, and scales per channel."""

import copy

import pytest
import torch
from helpers import Everything, Outlier, noise, small, sqnr_db, uneven_images
from torch import nn

from utils.errors import UserError
from utils.quantize import layers, ptq, start_qat
from utils.quantize.exact import execute
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
IMAGES = noise(32, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_eight_bits_come_near_the_float_network_and_sixteen_nearer(model, config):
    assert sqnr_db(model(IMAGES), execute(ptq(model, IMAGES, RECIPE, config), IMAGES)) > 18
    finer = QDQConfig(
        config.position, torch.int16, torch.int16, config.bias, symmetric=True, steps=2**16 - 1
    )
    assert sqnr_db(model(IMAGES), execute(ptq(model, IMAGES, RECIPE, finer), IMAGES)) > 65


def test_weights_are_those_of_the_folded_network(model):
    result, expected = ptq(model, IMAGES, RECIPE, OUTPUTS), folded(model)
    assert (
        list(result.layers) == list(layers.weighted(expected)) == list(layers.weighted(result.fp32))
    )
    for name, layer in result.layers.items():
        weight = expected.get_submodule(name).weight
        assert torch.equal(result.fp32.get_submodule(name).weight, weight)
        assert torch.equal(layer.scale, weight.abs().flatten(1).amax(1) / 127)
        assert (layer.weight.int().abs().flatten(1).amax(1) == 127).all()
        assert ((layer.values() - weight).abs().flatten(1).amax(1) <= 0.501 * layer.scale).all()


def test_the_channels_of_a_layer_share_a_scale_if_asked(model):
    result = ptq(model, IMAGES, RECIPE.replace(weight_scales="tensor"), OUTPUTS)
    for name, layer in result.layers.items():
        weight = result.fp32.get_submodule(name).weight
        assert torch.equal(layer.scale, (weight.abs().max() / 127).expand(len(weight)))
        assert layer.weight.int().abs().max() == 127


def test_layers_kept_in_fp32_are_kept_with_those_in_them():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3)),
        nn.Conv2d(4, 2, 1),
    ).eval()
    result = ptq(model, IMAGES, RECIPE.replace(keep_fp32=("0", "2")), OUTPUTS)
    assert list(result.layers) == ["1.0"] and result.keep_fp32 == ("0", "2")
    for name in ("0.0", "2"):
        assert type(result.network.get_submodule(name)) is nn.Conv2d
        assert torch.equal(
            result.network.get_submodule(name).weight, model.get_submodule(name).weight
        )


@pytest.mark.parametrize("method", [ptq, start_qat])
def test_a_module_that_the_network_lacks_cannot_stay_in_fp32(model, method):
    with pytest.raises(UserError, match=r"^RECIPE: keep_fp32 names 'stam'.*such as 'stem'"):
        method(model, IMAGES, RECIPE.replace(keep_fp32=("stem", "stam")), OUTPUTS)


@pytest.mark.parametrize("correction", [False, True])
def test_the_float_model_and_the_images_are_not_touched(model, correction):
    twin, shown = copy.deepcopy(model), IMAGES.clone()
    modules = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
    ptq(model, IMAGES, RECIPE.replace(bias_correction=correction), OUTPUTS)
    assert torch.equal(IMAGES, shown)
    assert [
        (name, type(module), set(vars(module))) for name, module in model.named_modules()
    ] == modules
    state, before = model.state_dict(), twin.state_dict()
    assert list(state) == list(before) and all(
        torch.equal(state[name], before[name]) for name in state
    )
    assert not any(module.training or module._forward_hooks for module in model.modules())


def test_a_model_in_training_mode_is_quantized_as_in_evaluation_and_stays_as_it_is(model):
    training = copy.deepcopy(model).train()
    recipe = RECIPE.replace(bias_correction=True)
    result = ptq(training, IMAGES, recipe, OUTPUTS)
    assert all(module.training for module in training.modules())
    assert torch.equal(training.norm.running_mean, model.norm.running_mean)
    assert result.digest() == ptq(model, IMAGES, recipe, OUTPUTS).digest()


@torch.no_grad()
def test_an_outlier_channel_does_not_coarsen_the_others():
    model, images = small(Outlier), uneven_images()

    def sqnr(position, scales):
        quantized = ptq(model, images, RECIPE, QDQConfig(position, scales=scales))
        return sqnr_db(model(images), execute(quantized, images))

    assert sqnr("inputs", "tensor") < 10 and sqnr("outputs", "tensor") < 10
    assert sqnr("inputs", "needed") > 25 and sqnr("outputs", "apart") > 25
    # The stem's output, which hardswish reads, also has a pair.
    assert sqnr("outputs", "needed") < 10
