"""Post-training quantization: what bias correction makes up for, what is left alone, and what a channel's scale rescues."""

import copy

import pytest
import torch
from helpers import Everything, Outlier, noise, small, sqnr_db, uneven_images
from torch import nn

from utils.quantize import layers, ptq
from utils.quantize.exact import ExactInterpreter, execute
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig

OUTPUTS = QDQConfig("outputs")
CONFIGS = [
    OUTPUTS,
    QDQConfig("outputs", torch.int8, bias="int32", steps=127),
    QDQConfig("inputs", scales="needed"),
    QDQConfig("inputs", scales="needed", rounded_sums=True, centred=True),
    QDQConfig("inputs", torch.int8, symmetric=True),
]
RECIPE = Int8(ranges="minmax")
SPATIAL = {
    "stem",
    "conv",
    "depthwise",
    "project",
}  # layers of Everything with more than one position an image
IMAGES = noise(32, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


# ---- the network


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
    result = ptq(model, IMAGES, RECIPE.replace(weights="tensor"), OUTPUTS)
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
    result = ptq(model, IMAGES, RECIPE.replace(keep_fp32=["0", "2"]), OUTPUTS)
    assert list(result.layers) == ["1.0"] and result.keep_fp32 == ("0", "2")
    for name in ("0.0", "2"):
        assert type(result.network.get_submodule(name)) is nn.Conv2d
        assert torch.equal(
            result.network.get_submodule(name).weight, model.get_submodule(name).weight
        )


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
    result = ptq(training, IMAGES, RECIPE.replace(bias_correction=True), OUTPUTS)
    assert all(module.training for module in training.modules())
    assert torch.equal(training.norm.running_mean, model.norm.running_mean)
    assert (
        result.digest()
        == ptq(model, IMAGES, RECIPE.replace(bias_correction=True), OUTPUTS).digest()
    )


def test_every_number_says_where_it_comes_from(model):
    origin = ptq(
        model, IMAGES, dict(ranges="mse"), QDQConfig("outputs", pooling_keeps_scale=True)
    ).origin
    assert origin["qdq_x"] == "mse of 32 images" and origin["qdq_squeeze"] == "as qdq_swish_1"
    assert origin["stem"] == "largest magnitude of each channel"
    corrected = ptq(model, IMAGES, RECIPE.replace(bias_correction=True), OUTPUTS)
    assert {corrected.origin[name] for name in SPATIAL} == {
        "largest magnitude of each channel, bias corrected"
    }
    assert {corrected.origin[name] for name in set(corrected.layers) - SPATIAL} == {
        "largest magnitude of each channel"
    }


# ---- bias correction


def sequence(*modules):
    torch.manual_seed(2)
    for module in modules:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return nn.Sequential(*modules).eval()


def exactly_rounded(conv: nn.Conv2d) -> nn.Conv2d:
    """`conv` with weights that rounding to 16 bits does not change by more than 2^-17 of the largest."""
    with torch.no_grad():
        conv.weight.mul_(2**6).round_().mul_(2**-6)
    return conv


INT16 = QDQConfig("inputs", torch.int16, torch.int16, symmetric=True, steps=2**16 - 1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_shifted_weight_is_made_up_for_by_the_bias(bias):
    """The known answer: where the float network's weights are larger by `shift`, its mean is by shift x mean input."""
    model = sequence(exactly_rounded(nn.Conv2d(3, 2, 1, bias=bias)), nn.ReLU())
    images = noise(8, 4) + torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    result = ptq(model, images, RECIPE, INT16)
    layer = result.layers["0"]
    integers, before = layer.weight.clone(), layer.bias.clone()
    shift = torch.tensor([[0.5, 0.0, 0.0], [0.0, -0.25, 1.0]])
    result.fp32.get_submodule("0").weight.data += shift.view(2, 3, 1, 1)
    ptq.correct_biases(result, images)
    assert torch.allclose(layer.bias, before + shift @ images.mean((0, 2, 3)), atol=1e-3)
    assert (layer.bias - before).abs().min() > 0.4
    assert torch.equal(layer.weight, integers)


def test_a_later_layer_sees_what_the_corrected_layers_before_it_give():
    model = sequence(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    images = noise(8, 4) + 2
    result = ptq(model, images, RECIPE, INT16)
    before = {name: layer.bias.clone() for name, layer in result.layers.items()}
    result.fp32.get_submodule("0").bias.data += 0.3
    ptq.correct_biases(result, images)
    assert torch.allclose(result.layers["0"].bias, before["0"] + 0.3, atol=1e-3)
    # The second layer already gets the corrected mean, so what is left to correct is none of the first one's.
    shift = model[1].weight.flatten(1).sum(1) * 0.3
    assert shift.abs().min() > 0.02
    assert torch.allclose(result.layers["1"].bias, before["1"], atol=2e-3)


def mean_errors(result, images):
    """How far exact execution shifts the mean of each channel from the float network's, by layer."""
    moments, errors = layers.channel_moments(result.fp32, [images]), {}

    def look(name, output):
        errors[name] = (layers.mean_by_channel(output) - moments[name][0]).abs().max().item()

    with torch.no_grad():
        ExactInterpreter(result, look).run(images.double())
    return errors


@pytest.mark.parametrize("config", CONFIGS)
def test_after_correction_layers_with_positions_have_the_mean_of_the_float_network(model, config):
    plain, result = (
        ptq(model, IMAGES, RECIPE.replace(bias_correction=each), config) for each in (False, True)
    )
    before, after = mean_errors(plain, IMAGES), mean_errors(result, IMAGES)
    assert list(after) == list(before) == list(result.layers)
    for name, layer in result.layers.items():
        if name not in SPATIAL:
            assert torch.equal(layer.bias, plain.layers[name].bias), name
            continue
        step = (
            (result.input_scale(name).max() * layer.scale.max()).item()
            if config.bias == "int32"
            else 0.0
        )
        assert after[name] <= 1e-6 + 0.51 * step, name
        assert config.bias == "int32" or after[name] < 0.1 * before[name], name


def test_corrected_biases_are_rounded_as_the_placement_says(model):
    result = ptq(model, IMAGES, RECIPE.replace(bias_correction=True), CONFIGS[1])
    for name, layer in result.layers.items():
        step = result.input_scale(name).double() * layer.scale.double()
        assert torch.equal(layer.bias, (layer.bias_integers * step).float())


def test_a_layer_kept_in_fp32_is_not_corrected(model):
    recipe = RECIPE.replace(keep_fp32=("conv", "norm"), bias_correction=True)
    result = ptq(model, IMAGES, recipe, OUTPUTS)
    assert torch.equal(result.network.conv.bias, folded(model).conv.bias)
    assert "conv" not in result.origin and "bias corrected" in result.origin["depthwise"]


def test_images_in_batches_count_the_same(monkeypatch, model):
    recipe = RECIPE.replace(bias_correction=True)
    whole = ptq(model, IMAGES, recipe, OUTPUTS)
    monkeypatch.setattr(ptq.calibration, "BATCH", 5)
    parts = ptq(model, IMAGES, recipe, OUTPUTS)
    for name, layer in whole.layers.items():
        assert torch.allclose(layer.bias, parts.layers[name].bias, atol=1e-5)


# ---- a scale for each channel


@torch.no_grad()
def test_an_outlier_channel_takes_nothing_from_the_others():
    model, images = small(Outlier), uneven_images()

    def sqnr(qdqs, scales):
        return sqnr_db(
            model(images),
            execute(ptq(model, images, RECIPE, QDQConfig(qdqs, scales=scales)), images),
        )

    assert sqnr("inputs", "tensor") < 10 and sqnr("outputs", "tensor") < 10
    assert sqnr("inputs", "needed") > 25 and sqnr("outputs", "apart") > 25
    assert (
        sqnr("outputs", "needed") < 10
    )  # the stem's output, which hardswish reads, has a pair, too


# ---- biases of 32 bits


def test_correction_keeps_within_32_bits():
    """Channels of which hardly more than the bias is left: 2^31 steps of their weights would not reach it."""
    model = sequence(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3))
    with torch.no_grad():
        model[2].weight *= torch.tensor([1, 1e-8, 1e-12]).view(-1, 1, 1, 1)
        model[2].bias.copy_(torch.tensor([0.5, 1.0, -2.0]))
    images = noise(16, 8)
    result = ptq(
        model, images, RECIPE.replace(bias_correction=True), QDQConfig("outputs", bias="int32")
    )
    with torch.no_grad():
        mean = model(images).mean((0, 2, 3))
    assert torch.allclose(result.layers["2"].bias[1:], mean[1:], rtol=1e-5)
