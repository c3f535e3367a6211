"""Fake quantization: where training starts, what learns, and what conversion keeps."""

import copy
import dataclasses

import pytest
import torch
from helpers import Everything, noise, small, small_depthwise, sqnr_db
from quantize_helpers import fit
from torch import nn

from utils import metrics
from utils.quantize import fake_quant, ptq, start_qat
from utils.quantize.exact import execute
from utils.quantize.fake_quant import (
    RANGE_UNIT,
    WEIGHT_UNITS,
    FakeQuantize,
    FakeQuantizedLayer,
    to_integers,
)
from utils.quantize.layers import weighted
from utils.quantize.qdq_config import INTEGERS, QDQConfig
from utils.recipes import Int8

UINT8 = QDQConfig("outputs", steps=127, pooling_keeps_scale=True, unit_gates=True)
INT16 = QDQConfig("outputs", torch.int16, torch.int16, "int32", True, 2**16 - 1, "apart")
CENTRED = QDQConfig("inputs", scales="needed", rounded_sums=True, centred=True)
CONFIGS = [
    UINT8,
    INT16,
    QDQConfig("inputs", scales="needed"),
    CENTRED,
    QDQConfig("inputs", torch.int8, symmetric=True),
]
RECIPE = Int8(ranges="minmax", calibration_images=24)
IMAGES = noise(24, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


def prepared(model, config=UINT8, **changes):
    return start_qat(model, IMAGES, RECIPE.replace(**changes), config.in_training)


def trained(model, config=UINT8, **changes):
    return fit(prepared(model, config, **changes), IMAGES)


def of_kind(network, kind):
    return {
        name: module
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, kind)
    }


def qdqs(network):
    return of_kind(network, FakeQuantize)


# ---- rounding, and gradients


@pytest.mark.parametrize(
    ("dtype", "zero_point"), [(torch.uint8, 100), (torch.int8, -30), (torch.int16, 0)]
)
def test_gradients_pass_the_rounding_and_stop_where_values_are_clipped(dtype, zero_point):
    qdq, (low, high) = FakeQuantize(INTEGERS[dtype]), INTEGERS[dtype]
    qdq.assign(torch.tensor(0.25), torch.tensor(zero_point))
    integers = torch.tensor([low - 3.0, low, -0.3 + zero_point, 0.4 + zero_point, high, high + 3.0])
    x = (0.25 * (integers - zero_point)).requires_grad_()
    rounded = qdq(x)
    rounded.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    expected = 0.25 * (
        torch.clamp(torch.round(x.detach() / 0.25) + zero_point, low, high) - zero_point
    )
    assert torch.equal(rounded.detach(), expected)


@torch.no_grad()
def test_training_clips_seven_bits_where_the_deployed_network_does():
    """Images of 1.9 times the range: the largest integers are 127 in both."""
    config = QDQConfig("outputs", overflow="all").fixed("activations")
    model, images = small_depthwise(), noise(8, 32)
    recipe = Int8(ranges="minmax", calibration_images=8)
    network = start_qat(model, images, recipe, config.in_training)
    assert {qdq.limits for qdq in qdqs(network).values()} == {(0, 127)}
    deployed = fake_quant.to_integers(network, (), config)
    x = 1.9 * images
    exact = execute(deployed, x)
    assert sqnr_db(exact, network.eval()(x)) > 40
    first = deployed.qdq("qdq_x")
    assert first(x).max() == first.scale * (127 - first.zero_point)
    for name in deployed.qdqs.source:
        deployed.qdq(name).limits = (0, 255)
    assert sqnr_db(exact, execute(deployed, x)) < 30  # it matters here


def straight_through(x, scale, zero_point, limits, shape=()):
    """LSQ+ by automatic differentiation: the gradient of rounding is 1."""

    def rounded(value):
        return value + (value.round() - value).detach()

    scale, zero_point = scale.view(shape), zero_point.view(shape)
    return (
        torch.clamp(rounded(x / scale) + rounded(zero_point), *limits) - rounded(zero_point)
    ) * scale


@pytest.mark.parametrize("channels", [0, 3])
def test_gradients_of_ranges_are_those_of_lsq_plus(channels):
    generator = torch.Generator().manual_seed(0)
    size, shape = ((channels,), (1, -1, 1, 1)) if channels else ((), ())
    scale, zero_point = (
        0.05 + 0.1 * torch.rand(size, generator=generator),
        90 + 80 * torch.rand(size, generator=generator),
    )
    x, weights = (torch.randn(4, 3, 6, 6, generator=generator) * factor for factor in (8, 1))
    grads = []
    for how in (
        lambda *a: fake_quant.RoundActivation.apply(*a, (0, 255)),
        lambda *a: straight_through(*a, (0, 255), shape),
    ):
        leaves = [value.clone().requires_grad_() for value in (x, scale, zero_point)]
        (how(*leaves) * weights).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    clipped = (grads[0][0] == 0).float().mean()
    assert 0.05 < clipped < 0.95  # both kinds of gradient were compared


def test_a_range_moves_by_its_width():
    qdq = FakeQuantize(INTEGERS[torch.uint8])
    qdq.assign(torch.tensor(0.5), torch.tensor(40))
    with torch.no_grad():
        qdq.stretch.fill_(2.0)
        qdq.shift.fill_(-1.0)
    assert qdq.scale.item() == 0.5 * (1 + 2 * RANGE_UNIT)
    assert qdq.zero_point.item() == 40 - 255 * RANGE_UNIT


def test_channels_have_scales_in_training_too():
    qdq = FakeQuantize(INTEGERS[torch.uint8])
    scale, zero_point = torch.tensor([0.5, 0.125, 2.0]), torch.tensor([0, 128, 255])
    qdq.assign(scale, zero_point)
    x = noise(2, 5).mul_(10).requires_grad_()
    shape = 1, 3, 1, 1
    integers = torch.round(x.detach() / scale.view(shape)) + zero_point.view(shape)
    assert torch.equal(
        qdq(x).detach(), (integers.clamp(0, 255) - zero_point.view(shape)) * scale.view(shape)
    )
    qdq(x).sum().backward()
    assert torch.equal(x.grad, ((integers >= 0) & (integers <= 255)).float())


@pytest.mark.parametrize("highest", [127, 2**15 - 1, None])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_weights_are_rounded_and_learn_in_units_of_their_channel(kind, highest):
    torch.manual_seed(0)
    layer = kind(3, 4, 3) if kind is nn.Conv2d else kind(5, 4)
    with torch.no_grad():
        layer.weight *= torch.tensor([1.0, 10, 0.01, 3]).view(-1, *[1] * (layer.weight.ndim - 1))
    before = copy.deepcopy(layer)
    largest = layer.weight.detach().abs().flatten(1).amax(1)
    layer = FakeQuantizedLayer(layer, largest / (highest or WEIGHT_UNITS), highest, torch.ones(4))
    assert torch.allclose(layer.weight.abs().flatten(1).amax(1), torch.full((4,), 127.0))
    weight, bias = layer.used()
    errors = ((weight - before.weight) / by(largest, weight)).abs()
    assert errors.max() <= (0.5001 / highest if highest else 1e-6) and torch.equal(
        bias, before.bias
    )
    (weight.sum() + bias.sum()).backward()
    assert torch.allclose(layer.weight.grad, by(largest / WEIGHT_UNITS, weight).expand_as(weight))
    assert torch.allclose(layer.bias.grad, torch.full((4,), RANGE_UNIT))


def by(values, weight):
    return values.view(-1, *[1] * (weight.ndim - 1))


def test_mixed_precision_rounds_to_the_integers_of_fp32():
    qdq = FakeQuantize(INTEGERS[torch.uint8])
    qdq.assign(torch.tensor(0.0301), torch.tensor(17))
    x = noise(64, 3).mul_(3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = qdq(x)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, qdq(x.float()))
    x.requires_grad_()
    qdq(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and set(x.grad.unique().tolist()) <= {0.0, 1.0}


# ---- the network that is trained


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "recipe", [{}, dict(equalize=True, bias_correction=True)], ids=["plain", "corrected"]
)
@torch.no_grad()
def test_training_starts_where_ptq_ends(model, config, recipe):
    """Scales and zero-points are equal; FP32's sums differ, and int32 biases are not rounded."""
    network, deployed = (
        prepared(model, config, **recipe).eval(),
        ptq(model, IMAGES, RECIPE.replace(**recipe), config),
    )
    expected = execute(deployed, IMAGES)
    finest = 60 if config is INT16 else 28
    assert metrics.sqnr_db(expected.numpy(), network(IMAGES).numpy()) > finest
    assert set(qdqs(network)) == set(deployed.qdqs.source)
    for name, qdq in qdqs(network).items():
        assert torch.equal(qdq.scale, deployed.qdq(name).scale), name
        assert torch.equal(qdq.zero_point, deployed.qdq(name).zero_point.float()), name


def test_the_float_model_is_left_alone(model):
    before = copy.deepcopy(model.state_dict())
    trained(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not of_kind(model, FakeQuantizedLayer)


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_biases_and_ranges_learn_and_nothing_else(model, config):
    before, after = prepared(model, config).state_dict(), trained(model, config).state_dict()
    moved = {
        name.rpartition(".")[::2] for name in before if not torch.equal(before[name], after[name])
    }
    layers = set(weighted(model))
    assert {where for where, what in moved if what == "weight"} == layers
    assert {where for where, what in moved if what == "bias"} == layers
    assert {what for _, what in moved} == {"weight", "bias", "stretch"} | (
        set() if config.symmetric else {"shift"}
    )
    assert ("qdq_gate", "stretch") not in moved or not config.unit_gates  # a gate ends at 1
    if config.pooling_keeps_scale:
        assert torch.equal(after["qdq_squeeze.stretch"], after["qdq_swish_1.stretch"])


def test_a_zero_point_in_the_middle_stays_there(model):
    learned = qdqs(trained(model, CENTRED))
    shifts = {name: qdq.shift.abs().max().item() for name, qdq in learned.items()}
    centred = {name for name, qdq in learned.items() if qdq.first_zero_point.eq(128).all()}
    assert "qdq_x" in centred != set(learned)
    assert all((shifts[name] == 0) == (name in centred) for name in learned), shifts


def test_dropout_rests_and_batchnorm_is_folded(model):
    network = prepared(model).train()
    assert torch.equal(network(IMAGES), network(IMAGES))
    assert not of_kind(network, nn.BatchNorm2d | nn.Dropout)


def test_dropout_between_a_layer_and_its_relu_moves_no_pair():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(27, 8), nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)
    ).eval()
    images = noise(24, 3)
    network = start_qat(model, images, RECIPE, UINT8)
    deployed = ptq(model, images, RECIPE, UINT8)
    assert set(qdqs(network)) == set(deployed.qdqs.source) == {"qdq_input_1", "qdq__1", "qdq__5"}
    assert (
        metrics.sqnr_db(execute(deployed, images).numpy(), network.eval()(images).detach().numpy())
        > 40
    )


def test_training_on_fp32_logits_brings_the_network_nearer_to_fp32(model):
    """Five bits leave much to learn."""
    coarse = QDQConfig("inputs", steps=31)
    network = prepared(model, coarse)
    with torch.no_grad():
        expected = model(IMAGES)
        before = metrics.sqnr_db(expected.numpy(), network(IMAGES).numpy())
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(IMAGES), expected).backward()
        optimizer.step()
    result = execute(to_integers(network, (), coarse), IMAGES).numpy()
    assert metrics.sqnr_db(expected.numpy(), result) > before + 1.0


# ---- conversion


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_conversion_keeps_the_logits_of_the_trained_network(model, config):
    with torch.enable_grad():
        network = trained(model, config, headroom=2.0)
    result = to_integers(network, (), config)
    rounded, answer = network(IMAGES), execute(result, IMAGES)
    sqnr = metrics.sqnr_db(rounded.numpy(), answer.numpy())  # None: equal, as both are rounded
    assert sqnr is None or sqnr > (55 if config is INT16 else 25)
    assert metrics.sqnr_db(rounded.numpy(), model(IMAGES).numpy()) < 25  # it did learn something


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_conversion_keeps_weights_biases_and_ranges(model, config):
    with torch.enable_grad():
        network = trained(model, config)
    result = to_integers(network, (), config)
    assert list(result.layers) == list(weighted(model))
    for name, layer in result.layers.items():
        weight, bias = network.get_submodule(name).used()
        assert torch.allclose(layer.bias, bias, rtol=1e-4, atol=1e-5), name
        if config.bias == "float":  # biases of 32 bits may need larger steps
            assert torch.allclose(layer.values(), weight, rtol=1e-5, atol=0), name
    for name, qdq in qdqs(network).items():
        assert torch.equal(result.qdq(name).scale, qdq.scale)
        assert torch.equal(
            result.qdq(name).zero_point, qdq.zero_point.round().clamp(*qdq.limits).long()
        )
        assert result.qdq(name).dtype == config.activation


def test_int8_takes_a_training_in_uint8_with_zero_points_lower_by_128(model):
    network, int8 = trained(model), dataclasses.replace(UINT8, activation=torch.int8)
    assert int8.in_training == UINT8
    as_uint8, as_int8 = (to_integers(network, (), config) for config in (UINT8, int8))
    for name in as_uint8.qdqs.source:
        assert torch.equal(as_int8.qdq(name).zero_point, as_uint8.qdq(name).zero_point - 128)
        assert torch.equal(as_int8.qdq(name).scale, as_uint8.qdq(name).scale)
    assert torch.equal(execute(as_int8, IMAGES), execute(as_uint8, IMAGES))


def test_int8_with_zero_points_of_0_is_trained_as_it_is(model):
    symmetric = QDQConfig("inputs", torch.int8, symmetric=True)
    result = to_integers(trained(model, symmetric), (), symmetric)
    assert all(not result.qdq(name).zero_point.any() for name in result.qdqs.source)


@torch.no_grad()
def test_fp32_is_the_trained_network_without_rounding(model):
    with torch.enable_grad():
        network = trained(model)
    result = to_integers(network, (), UINT8)
    for layer in of_kind(network, FakeQuantizedLayer).values():
        layer.highest = None
    for name in qdqs(network):
        network.set_submodule(name, nn.Identity())
    torch.testing.assert_close(result.fp32(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(result.fp32(IMAGES), model(IMAGES), atol=1e-2)


def test_the_trained_weights_come_back_from_their_file(model):
    network, again = trained(model), prepared(model).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(again(IMAGES), network(IMAGES))
    assert to_integers(again, (), UINT8).digest() == to_integers(network, (), UINT8).digest()


def test_layers_kept_in_fp32_do_not_learn(model):
    keep = ("stem", "excite", "fc")
    network = trained(model, keep_fp32=keep)
    assert type(network.excite) is nn.Conv2d and type(network.reduce) is FakeQuantizedLayer
    assert torch.equal(network.excite.weight, model.excite.weight)
    result = to_integers(network, keep, UINT8)
    assert not set(keep) & set(result.layers) and len(result.layers) == 5
    with torch.no_grad():
        assert metrics.sqnr_db(network(IMAGES).numpy(), execute(result, IMAGES).numpy()) > 25


def test_logits_that_stay_float_are_rounded_in_training_only(model):
    deployed = dataclasses.replace(UINT8, float_logits=True, bias="int32")
    network = trained(model, deployed)
    assert "qdq_head" in qdqs(network)
    result = to_integers(network, (), deployed)
    assert set(qdqs(network)) - set(result.qdqs.source) == {"qdq_head"}
    assert result.layers["head"].bias_integers is not None
