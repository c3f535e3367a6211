"""The numbers of a quantized network: integers as NumPy computes them, the file and the digest."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers import Everything, noise, small
from torch import nn

from utils.errors import UserError
from utils.quantize import modules, network, ptq
from utils.quantize.exact import execute
from utils.quantize.modules import QDQ, QuantizedLayer, quantize_weight
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import INTEGERS, QDQConfig
from utils.recipes import Int8

OUTPUTS = QDQConfig("outputs")
INT32 = INTEGERS[torch.int32][1]
RECIPE = Int8(ranges="minmax", calibration_images=8)
IMAGES = noise(8, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


# ---- activations


def qdq(dtype, scale, zero_point):
    module = QDQ(dtype)
    module.assign(torch.as_tensor(scale, dtype=torch.float32), torch.as_tensor(zero_point))
    return module


@pytest.mark.parametrize(
    ("dtype", "zero_point"),
    [(torch.uint8, 100), (torch.int8, -28), (torch.int8, 0), (torch.int16, 0)],
)
def test_activations_are_numpys_integers_times_the_scale(dtype, zero_point):
    x = noise(100, 20) * 3
    lowest, highest = INTEGERS[dtype]
    scale = np.float32(5 / (highest - lowest))
    integers = np.clip(np.rint(x.numpy() * (np.float32(1) / scale)) + zero_point, lowest, highest)
    assert {integers.min(), integers.max()} == {lowest, highest}  # both ends are reached, and held
    answer = qdq(dtype, scale, zero_point)(x)
    assert np.array_equal(answer.numpy(), (integers - zero_point).astype(np.float32) * scale)
    assert len(answer.unique()) <= highest - lowest + 1


def test_channels_can_have_separate_numbers():
    x = noise(4, 5)
    scales, zero_points = torch.tensor([2.0**-7, 2.0**-5, 2.0**-3]), torch.tensor([0, 100, 255])
    answer = qdq(torch.uint8, scales, zero_points)(x)
    for channel in range(3):
        alone = qdq(torch.uint8, scales[channel], zero_points[channel])
        assert torch.equal(answer[:, channel], alone(x[:, channel]))


def test_halves_are_rounded_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert qdq(torch.int8, 1.0, 0)(x).tolist() == [-2, -2, 0, 0, 2, 2]
    # An odd zero-point changes nothing.
    assert qdq(torch.uint8, 1.0, 7)(x).tolist() == [-2, -2, 0, 0, 2, 2]


# ---- weights


def by_channel(factors):
    return torch.tensor(factors).view(-1, 1, 1, 1)


@pytest.mark.parametrize(("dtype", "highest"), [(torch.int8, 127), (torch.int16, 32767)])
def test_weights_are_numpys_integers_for_each_channel(dtype, highest):
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight * by_channel([1e-2, 0.1, 1, 10, 100])
    weight[2] = 0
    integers, scale = quantize_weight(weight, highest)
    channels = zip(integers.numpy(), weight.numpy(), scale.numpy(), strict=True)
    for numbers, channel, unit in channels:
        # A channel of zeros has the layer's largest scale.
        largest = np.abs(channel if channel.any() else weight.numpy()).max()
        assert unit == np.float32(largest) / np.float32(highest)
        assert np.array_equal(numbers, np.rint(channel / unit))
        assert np.abs(numbers).max() == (highest if channel.any() else 0)
    layer = QuantizedLayer(nn.Conv2d(4, 5, 3), dataclasses.replace(OUTPUTS, weight=dtype))
    layer.quantize(conv_of(weight), torch.tensor(1.0))
    assert layer.weight.dtype == dtype and np.array_equal(layer.weight.numpy(), integers.numpy())
    assert torch.equal(layer.values(), integers * scale.view(-1, 1, 1, 1))


def conv_of(weight, bias=None):
    conv = nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:], bias=bias is not None)
    conv.weight.data = weight
    if bias is not None:
        conv.bias.data = bias
    return conv


def test_a_smallest_scale_holds_for_the_channels_below_it():
    weight = torch.tensor([[127.0, -3], [0.5, 0.2], [0, 0]])
    integers, scale = quantize_weight(weight, 127, torch.tensor([0.5, 0.25, 0.125]))
    assert scale.tolist() == [1, 0.25, 1]
    assert integers.tolist() == [[127, -3], [2, 1], [0, 0]]
    assert quantize_weight(torch.zeros(2, 3), 127)[1].tolist() == [1, 1]


def test_no_scale_is_too_small_for_engines():
    """Scales are at least SMALLEST_SCALE times the layer's largest."""
    weight = torch.tensor([[127.0], [1e-3], [1e-5]])
    integers, scale = quantize_weight(weight, 127)
    assert scale.tolist() == [1, pytest.approx(1e-3 / 127), modules.SMALLEST_SCALE]
    assert integers.tolist() == [[127], [127], [10]]


# ---- biases


def layer_with(bias, weight_scale, input_scale, kind="int32"):
    bias, weight_scale = torch.tensor(bias), torch.tensor(weight_scale)
    layer = QuantizedLayer(nn.Linear(1, len(bias)), dataclasses.replace(OUTPUTS, bias=kind))
    layer.scale = weight_scale
    layer.set_bias(bias, torch.as_tensor(input_scale))
    return layer


def test_int32_biases_are_in_units_of_input_scale_times_weight_scale():
    layer = layer_with([0.5, -3.0, 100.0, 0.0], [2.0**-13, 2.0**-14, 2.0**-15, 2.0**-15], 2.0**-12)
    assert layer.bias_integers.dtype == torch.int32
    # The third bias does not fit.
    assert layer.bias_integers.tolist() == [2**24, -3 * 2**26, INT32, 0]
    assert layer.bias.tolist() == [0.5, -3.0, pytest.approx(16, abs=1e-5), 0.0]


def test_int32_biases_have_the_scale_of_their_channel():
    layer = layer_with([1.0, 1.0], [2.0**-8, 2.0**-9], [2.0**-4, 2.0**-6])
    assert layer.bias_integers.tolist() == [2**12, 2**15]


def test_float_biases_are_not_rounded():
    layer = layer_with([0.1, -3.3], [0.5, 0.5], 0.5, "float")
    assert layer.bias_integers is None and torch.equal(layer.bias, torch.tensor([0.1, -3.3]))


@pytest.mark.parametrize("input_scale", [0.02, [0.02, 1e-4, 3.0, 0.02, 1e-9]])
def test_biases_never_clip_however_small_the_weights(input_scale):
    """Channels with tiny weights: 2^31 of their steps would not reach the bias."""
    weight = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * by_channel(
        [1, 1e-6, 1e-12, 0, 1e-3]
    )
    bias = torch.tensor([0.5, -3.0, 2.0, -1.0, 7.0])
    layer = QuantizedLayer(nn.Conv2d(5, 5, 3, groups=5), dataclasses.replace(OUTPUTS, bias="int32"))
    layer.quantize(conv_of(weight, bias), torch.tensor(input_scale))
    step = torch.tensor(input_scale) * layer.scale
    assert ((layer.bias - bias).abs() <= 0.51 * step + 2e-7 * bias.abs()).all()
    assert step[1:3].max() < 1e-4  # of the two that have hardly any weights
    error = (layer.values() - weight).abs().flatten(1).amax(1)
    assert (error <= 0.501 * layer.scale).all()  # no weight clips
    assert layer.weight[0].abs().max() == 127 and not layer.weight[3].any()


def test_a_layer_without_bias_has_zeros():
    layer = QuantizedLayer(nn.Linear(4, 3, bias=False), OUTPUTS)
    layer.quantize(nn.Linear(4, 3, bias=False), torch.tensor(1.0))
    assert layer.bias.tolist() == [0, 0, 0]


# ---- the network


def test_the_skeleton_has_pairs_and_integers_where_the_configuration_says(model):
    result = Quantized.skeleton(folded(model), OUTPUTS, ("excite",))
    assert list(result.layers) == ["stem", "conv", "depthwise", "reduce", "project", "fc", "head"]
    assert type(result.network.excite) is nn.Conv2d and torch.equal(
        result.network.excite.weight, model.excite.weight
    )
    qdqs = [name for name, module in result.network.named_modules() if isinstance(module, QDQ)]
    assert set(qdqs) == set(result.qdqs.source) and not result.network.training
    assert result.architecture == "everything"
    assert result.input_scale("conv") is result.qdq("qdq_stem").scale


def test_a_layer_computes_with_the_values_of_its_integers(model):
    result = ptq(model, IMAGES, RECIPE, OUTPUTS)
    layer, x = result.layers["depthwise"], noise(2, 9)[:, :1].expand(2, 8, 9, 9)
    expected = nn.functional.conv2d(x, layer.values(), layer.bias, groups=8)
    assert torch.equal(layer(x), expected)
    assert torch.equal(
        result.layers["fc"](x[:, :, 0, 0]),
        nn.functional.linear(x[:, :, 0, 0], result.layers["fc"].values(), result.layers["fc"].bias),
    )


# ---- the file


CONFIGS = [
    OUTPUTS,
    QDQConfig("outputs", torch.int16, torch.int16, "int32", True, 2**16 - 1, "apart"),
    QDQConfig("inputs", torch.int8, bias="int32", scales="needed"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_network_of_the_file_is_the_one_that_was_saved(model, config, tmp_path):
    result = ptq(model, IMAGES, RECIPE.replace(keep_fp32=("reduce",), bias_correction=True), config)
    result.save(tmp_path / "file")
    again = Quantized.load(tmp_path / "file", small(Everything))
    assert again.digest() == result.digest()
    assert (again.config, again.keep_fp32, again.qdqs) == (config, ("reduce",), result.qdqs)
    before, after = result.network.state_dict(), again.network.state_dict()
    assert list(before) == list(after) and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert torch.equal(execute(again, IMAGES), execute(result, IMAGES))
    with torch.inference_mode():
        assert torch.equal(again.network(IMAGES), result.network(IMAGES))


def test_the_file_holds_integers_and_no_float_weights(model, tmp_path):
    result = ptq(model, IMAGES, RECIPE, CONFIGS[1])
    result.save(tmp_path / "file")
    state = torch.load(tmp_path / "file", weights_only=True)["state_dict"]
    assert {state[f"{name}.weight"].dtype for name in result.layers} == {torch.int16}
    assert {state[f"{name}.bias_integers"].dtype for name in result.layers} == {torch.int32}
    scales_and_biases = [value for value in state.values() if value.is_floating_point()]
    assert all(value.numel() <= 8 for value in scales_and_biases)


def test_the_catalog_gives_the_structure_of_its_architectures(monkeypatch, model, tmp_path):
    result = ptq(model, IMAGES, RECIPE, OUTPUTS)
    result.save(tmp_path / "file")
    monkeypatch.setattr(network.architectures, "build", {"everything": copy.deepcopy(model)}.get)
    assert Quantized.load(tmp_path / "file").digest() == result.digest()


def test_a_damaged_file_is_the_users_to_delete(model, tmp_path):
    path = tmp_path / "file"
    result = ptq(model, IMAGES, RECIPE, OUTPUTS)
    result.save(path)
    content = path.read_bytes()
    later = torch.load(path, weights_only=True) | {"format": network.FILE_FORMAT + 1}
    damages = (
        lambda: path.write_bytes(content[:1000]),
        lambda: path.write_bytes(b""),
        lambda: torch.save([1], path),
        lambda: torch.save(later, path),
        path.unlink,
    )
    message = "holds no quantized network that this version can read; delete it and run again"
    for damage in damages:
        damage()
        with pytest.raises(UserError, match=message):
            Quantized.load(path, model)


# ---- the digest


def test_the_digest_is_of_every_number_and_setting(model):
    result = ptq(model, IMAGES, RECIPE, CONFIGS[1])
    digests = {result.digest()}
    assert copy.deepcopy(result).digest() in digests
    for name in result.network.state_dict():
        changed = copy.deepcopy(result)
        state = changed.network.state_dict()
        state[name].view(-1)[-1] += 1
        assert changed.digest() not in digests, name
        digests.add(changed.digest())
    for change in (dict(config=OUTPUTS), dict(keep_fp32=("stem",)), dict(architecture="other")):
        assert dataclasses.replace(result, **change).digest() not in digests
