"""Quantization-aware training: what is rounded, what moves, and that conversion keeps what was trained."""

import copy
import dataclasses

import pytest
import torch
from helpers import Everything, noise, small
from torch import nn

from utils import metrics
from utils.quantize import ptq, qat
from utils.quantize.layers import weighted
from utils.quantize.operators import folded
from utils.quantize.placement import INTEGERS, Placement
from utils.quantize.qat import RoundedConv2d, RoundedLinear, TrainedPair
from utils.quantize.quantized import by_output, quantize_weight
from utils.quantize.reference import execute

UINT8 = Placement("outputs", levels=127, pooling_keeps_scale=True, unit_gates=True)
INT16 = Placement("outputs", torch.int16, torch.int16, "int32", True, 2**16 - 1, "apart")
PLACEMENTS = [UINT8, INT16, Placement("inputs", scales="depthwise"), Placement("inputs", torch.int8, symmetric=True)]
RECIPE = dict(activations="minmax", calibration_images=24)
IMAGES = noise(24, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


def prepared(model, placement=UINT8, **changes):
    return qat.trainable(model, IMAGES, RECIPE | changes, placement.in_training)


def trained(model, placement=UINT8, **changes):
    """A network that took a few steps of training, in evaluation mode."""
    torch.manual_seed(1)
    network = prepared(model, placement, **changes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(IMAGES), torch.arange(len(IMAGES)) % 2).backward()
        optimizer.step()
    return network.eval()


def pairs(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, TrainedPair)}


# ---- rounding, and gradients


@pytest.mark.parametrize(("dtype", "zero_point"), [(torch.uint8, 100), (torch.int8, -30), (torch.int16, 0)])
def test_gradients_pass_the_rounding_and_stop_where_values_are_clipped(dtype, zero_point):
    pair, (low, high) = TrainedPair(dtype), INTEGERS[dtype]
    pair.assign(torch.tensor(0.25), torch.tensor(zero_point))
    integers = torch.tensor([low - 3.0, low, -0.3 + zero_point, 0.4 + zero_point, high, high + 3.0])
    x = (0.25 * (integers - zero_point)).requires_grad_()
    rounded = pair(x)
    rounded.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    expected = 0.25 * (torch.clamp(torch.round(x.detach() / 0.25) + zero_point, low, high) - zero_point)
    assert torch.equal(rounded.detach(), expected)


def test_channels_have_scales_in_training_too():
    pair = TrainedPair(torch.uint8)
    scale, zero_point = torch.tensor([0.5, 0.125, 2.0]), torch.tensor([0, 128, 255])
    pair.assign(scale, zero_point)
    x = noise(2, 5).mul_(10).requires_grad_()
    shape = 1, 3, 1, 1
    integers = torch.round(x.detach() / scale.view(shape)) + zero_point.view(shape)
    assert torch.equal(pair(x).detach(), (integers.clamp(0, 255) - zero_point.view(shape)) * scale.view(shape))
    pair(x).sum().backward()
    assert torch.equal(x.grad, ((integers >= 0) & (integers <= 255)).float())


@pytest.mark.parametrize("layer", [RoundedConv2d(3, 4, 3), RoundedLinear(5, 4)])
def test_weights_are_rounded_and_their_gradients_are_not(layer):
    torch.manual_seed(0)
    layer.reset_parameters()
    integers, scale = quantize_weight(layer.weight, 127)
    assert torch.allclose(layer.rounded(), integers * by_output(scale, layer.weight), atol=1e-7)
    plain = copy.deepcopy(layer)
    plain.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    with torch.no_grad():
        plain.weight.copy_(layer.rounded())
    x = torch.randn(2, 3, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(2, 5)
    for network in (layer, plain):
        network(x).square().sum().backward()
    assert torch.equal(layer(x), plain(x)) and torch.equal(layer.weight.grad, plain.weight.grad)
    assert layer.weight.grad.abs().min() > 0


# ---- the network that is trained


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_training_rounds_as_the_deployed_network_does(model, placement):
    """Where integers and zero-points are the same, only FP32's sums and biases differ."""
    network, deployed = prepared(model, placement).eval(), ptq.quantize(model, IMAGES, RECIPE, placement)
    expected = execute(deployed, IMAGES)
    finest = 60 if placement is INT16 else 28
    assert metrics.sqnr_db(expected.numpy(), network(IMAGES).numpy()) > finest
    assert set(pairs(network)) == set(deployed.pairs.source)
    for name, pair in pairs(network).items():
        assert torch.equal(pair.scale, deployed.pair(name).scale), name
        assert torch.equal(pair.zero_point.long(), deployed.pair(name).zero_point), name


def test_parameters_keep_their_names_and_values(model):
    network = prepared(model)
    parameters = dict(network.named_parameters())
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(parameters[name], value) for name, value in model.named_parameters())
    assert network.training and not model.training
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert any(isinstance(module, nn.Dropout) for module in network.modules())


def test_folding_batchnorm_leaves_the_integers_of_the_weights_alone(model):
    network = folded(model)
    for name in ("stem", "conv", "depthwise"):
        integers, _ = quantize_weight(model.get_submodule(name).weight, 127)
        after, _ = quantize_weight(network.get_submodule(name).weight, 127)
        changed = (integers - after).abs()
        assert changed.max() <= 1 and changed.mean() < 0.01  # a product may round to the other side of a half


def test_the_float_model_is_left_alone(model):
    before = copy.deepcopy(model.state_dict())
    trained(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(isinstance(module, RoundedConv2d | RoundedLinear) for module in model.modules())


def test_ranges_stay_and_batchnorm_moves(model):
    network = prepared(model)
    before = copy.deepcopy(network.state_dict())
    after = trained(model).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("pair_") for name in moved)
    assert moved >= {f"{norm}.running_mean" for norm in ("stem_norm", "norm", "depth_norm")}
    assert moved >= {name for name, _ in model.named_parameters()}  # every weight learns


def test_dropout_rests_in_evaluation_and_not_in_training(model):
    network = prepared(model)
    network.eval()
    assert torch.equal(network(IMAGES), network(IMAGES))
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(network(IMAGES), network(IMAGES))


def test_dropout_between_a_layer_and_its_relu_moves_no_pair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)).eval()
    images = noise(24, 3)
    network = qat.trainable(model, images, RECIPE, UINT8)
    deployed = ptq.quantize(model, images, RECIPE, UINT8)
    assert set(pairs(network)) == set(deployed.pairs.source) == {"pair_input_1", "pair__1", "pair__5"}
    assert metrics.sqnr_db(execute(deployed, images).numpy(), network.eval()(images).detach().numpy()) > 40


# ---- conversion


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_conversion_answers_as_the_trained_network(model, placement):
    with torch.enable_grad():
        network = trained(model, placement, headroom=2.0)
    result = qat.convert(network, model, RECIPE, placement)
    rounded, answer = network(IMAGES), execute(result, IMAGES)
    assert metrics.sqnr_db(rounded.numpy(), answer.numpy()) > (55 if placement is INT16 else 25)
    assert metrics.sqnr_db(rounded.numpy(), model(IMAGES).numpy()) < 20  # it did learn something


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_conversion_keeps_weights_and_ranges(model, placement):
    network = trained(model, placement)
    result = qat.convert(network, model, RECIPE, placement)
    assert list(result.layers) == list(weighted(model))
    for name, layer in result.layers.items():
        error = (layer.values() - result.reference.get_submodule(name).weight).abs().flatten(1).amax(1)
        assert (error <= 0.51 * layer.scale).all(), name
        if placement.bias == "float":  # biases of 32 bits may need larger steps
            integers, _ = quantize_weight(network.get_submodule(name).weight, placement.highest_weight)
            changed = (layer.weight - integers).abs()
            assert changed.max() <= 1 and changed.mean() < 0.05, name
    for name, pair in pairs(network).items():
        assert torch.equal(result.pair(name).scale, pair.scale)
        assert torch.equal(result.pair(name).zero_point, pair.zero_point.long())
        assert result.pair(name).dtype == placement.activation


def test_int8_takes_a_training_in_uint8_with_zero_points_lower_by_128(model):
    network, int8 = trained(model), dataclasses.replace(UINT8, activation=torch.int8)
    assert int8.in_training == UINT8
    as_uint8, as_int8 = (qat.convert(network, model, RECIPE, placement) for placement in (UINT8, int8))
    for name in as_uint8.pairs.source:
        assert torch.equal(as_int8.pair(name).zero_point, as_uint8.pair(name).zero_point - 128)
        assert torch.equal(as_int8.pair(name).scale, as_uint8.pair(name).scale)
    assert torch.equal(execute(as_int8, IMAGES), execute(as_uint8, IMAGES))


def test_int8_with_zero_points_of_0_is_trained_as_it_is(model):
    symmetric = Placement("inputs", torch.int8, symmetric=True)
    result = qat.convert(trained(model, symmetric), model, RECIPE, symmetric)
    assert all(not result.pair(name).zero_point.any() for name in result.pairs.source)


def test_the_reference_is_the_trained_network_without_rounding(model):
    network = trained(model)
    result = qat.convert(network, model, RECIPE, UINT8)
    twin = copy.deepcopy(model)
    twin.load_state_dict({name: value for name, value in network.state_dict().items() if not name.startswith("pair_")})
    with torch.no_grad():
        torch.testing.assert_close(result.reference(IMAGES), twin(IMAGES), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(twin(IMAGES), model(IMAGES), atol=1e-2)


def test_the_trained_weights_come_back_from_their_file(model):
    network, again = trained(model), prepared(model).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(again(IMAGES), network(IMAGES))
    assert qat.convert(again, model, RECIPE, UINT8).digest() == qat.convert(network, model, RECIPE, UINT8).digest()


def test_layers_kept_in_fp32_are_trained_and_kept(model):
    keep = ("stem", "excite", "fc")
    network = trained(model, keep_fp32=keep)
    assert type(network.excite) is nn.Conv2d and type(network.reduce) is RoundedConv2d
    assert not torch.equal(network.excite.weight, model.excite.weight)
    result = qat.convert(network, model, RECIPE | dict(keep_fp32=keep), UINT8)
    assert not set(keep) & set(result.layers) and len(result.layers) == 5
    assert torch.equal(result.network.excite.weight, network.excite.weight)
    with torch.no_grad():
        assert metrics.sqnr_db(network(IMAGES).numpy(), execute(result, IMAGES).numpy()) > 25


def test_logits_that_stay_float_are_rounded_in_training_only(model):
    deployed = dataclasses.replace(UINT8, float_logits=True, bias="int32")
    network = trained(model, deployed)
    assert "pair_head" in pairs(network)
    result = qat.convert(network, model, RECIPE, deployed)
    assert set(pairs(network)) - set(result.pairs.source) == {"pair_head"}
    assert result.layers["head"].bias_integers is not None


def test_every_number_says_where_it_comes_from(model):
    origin = qat.convert(trained(model), model, RECIPE, UINT8).origin
    assert origin["pair_x"] == "minmax of 24 images, kept in training"
    assert origin["pair_squeeze"] == "as pair_swish_1, kept in training"
    assert origin["stem"] == "trained; largest magnitude of each channel"
