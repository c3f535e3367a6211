"""Calibration: observed values, the ranges that each method derives, and scales."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers import Everything, noise, small
from torch import nn

from utils.errors import UserError
from utils.quantize import calibration
from utils.quantize.calibration import BINS, RANGES, Observer
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

UINT8, SEVEN_BITS = QDQConfig("outputs"), QDQConfig("outputs", steps=127)
SYMMETRIC = QDQConfig("outputs", torch.int8, symmetric=True)
INT16 = QDQConfig("outputs", torch.int16, symmetric=True, steps=2**16 - 1)
RECIPE = Int8(ranges="minmax", calibration_images=40)
ALL = [UINT8, SEVEN_BITS, SYMMETRIC, INT16, QDQConfig("outputs", torch.int8)]


def observed(values: torch.Tensor, channelwise: bool = False) -> Observer:
    """An observer that has seen `values` twice, as in calibration: for ends, then for counts."""
    observer = Observer()
    observer.channelwise = channelwise
    calibration.observe(observer, values)
    observer.counts = torch.zeros(len(observer.low), BINS, dtype=torch.float64)
    calibration.observe(observer, values)
    return observer


# ---- observed values


class Recorder(nn.Module):
    """Keeps all images that it reads."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.seen.append(x.clone())


def test_calibration_shows_every_image_once_in_order_without_gradients():
    images, recorder = noise(70, 4), Recorder()
    calibration.observe(recorder, images)
    assert len(recorder.seen) == 3 and torch.equal(torch.cat(recorder.seen), images)


def test_histograms_are_numpys_over_all_batches():
    images = noise(70, 8)
    observer = observed(images)
    assert (observer.low.item(), observer.high.item()) == (images.min(), images.max())
    expected = np.histogram(images.numpy(), BINS, (images.min().item(), images.max().item()))[0]
    assert observer.counts.sum() == images.numel()
    assert np.abs(observer.counts[0].numpy() - expected).sum() <= 8  # values on an edge


def test_channels_have_histograms_of_their_values():
    images = noise(70, 8) * torch.tensor([1, 10, 1e-3]).view(1, 3, 1, 1)
    images[:, 2].abs_()
    observer = observed(images, channelwise=True)
    for channel in range(3):
        values = images[:, channel].numpy()
        low, high = min(values.min(), 0), values.max()
        assert (observer.low[channel].item(), observer.high[channel].item()) == (low, high)
        expected = np.histogram(values, BINS, (low, high))[0]
        assert np.abs(observer.counts[channel].numpy() - expected).sum() <= 8


def test_a_range_always_includes_zero():
    for sign in (1, -1):
        observer = observed(sign * (5 + noise(4, 8).abs()))
        assert sorted([abs(observer.low.item()), abs(observer.high.item())])[0] == 0


# ---- the methods


def histogram(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    return np.histogram(values, BINS, (low, high))[0].astype(float), low, high


def squared_error(values: np.ndarray, low: float, high: float, steps: int) -> float:
    """Mean squared error of clipping to [low, high] and rounding to steps of which 0 is one."""
    step = (high - low) / steps
    zero_point = np.rint(-low / step)
    return np.square(
        values - (np.clip(np.rint(values / step) + zero_point, 0, steps) - zero_point) * step
    ).mean()


RANDOM = np.random.default_rng(0)
SAMPLES = {
    "normal": RANDOM.standard_normal(10_000),
    "positive": RANDOM.exponential(size=10_000),
    "negative": -RANDOM.exponential(size=10_000),
    "after relu": np.maximum(RANDOM.standard_normal(10_000), 0),
    "nearly zeros": RANDOM.laplace(size=10_000) ** 3,
    "mostly zeros": np.maximum(RANDOM.laplace(size=10_000) - 1.6, 0),  # nine of ten
}


def test_minmax_clips_nothing():
    for values in SAMPLES.values():
        counts, low, high = histogram(values)
        assert RANGES["minmax"](counts, low, high, UINT8) == (low, high)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("steps", [15, 127, 255])
def test_mse_finds_the_range_that_really_has_the_least_error(name, steps):
    values = SAMPLES[name]
    counts, low, high = histogram(values)
    chosen = RANGES["mse"](counts, low, high, dataclasses.replace(UINT8, steps=steps))
    error = squared_error(values, *chosen, steps)
    shares = np.linspace(0.04, 1, 25)
    lows, highs = shares * low if low else [0.0], shares * high if high else [0.0]
    assert error < 1.05 * min(
        squared_error(values, low, high, steps) for low in lows for high in highs
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_with_equal_ends_finds_the_limit_of_least_error(name):
    values = SAMPLES[name]
    low, high = RANGES["mse"](*histogram(values), SYMMETRIC)
    assert low == -high
    limits = np.linspace(0.04, 1, 100) * np.abs(values).max()
    assert squared_error(values, low, high, 254) < 1.05 * min(
        squared_error(values, -limit, limit, 254) for limit in limits
    )


def test_mse_clips_what_is_rare_and_keeps_what_is_not():
    heavy = np.random.default_rng(0).laplace(size=100_000)
    counts, low, high = histogram(heavy)
    chosen = RANGES["mse"](counts, low, high, dataclasses.replace(UINT8, steps=15))
    assert squared_error(heavy, *chosen, 15) < 0.5 * squared_error(heavy, low, high, 15)
    counts, low, high = histogram(SAMPLES["mostly zeros"])
    # Zeros are exact whatever the step.
    assert RANGES["mse"](counts, low, high, UINT8)[1] > 0.8 * high


def test_percentile_keeps_its_share():
    count = 1_000_000
    uniform = np.arange(count) / count
    rest, one_bin = 1 - calibration.PERCENTILE / 100, 1 / BINS
    low, high = RANGES["percentile"](*histogram(uniform), UINT8)
    assert low == 0 and high == pytest.approx(1 - rest, abs=one_bin)
    low, high = RANGES["percentile"](*histogram(2 * uniform - 1), UINT8)
    assert low == pytest.approx(-1 + rest, abs=2 * one_bin) and high == pytest.approx(
        1 - rest, abs=2 * one_bin
    )


@pytest.mark.parametrize("side", [1, -1])
def test_percentile_gives_up_no_more_than_its_share(side):
    """Ten of a million are outliers: PERCENTILE drops this share if one end is 0."""
    values = side * np.concatenate([np.full(999_990, 1.0), np.full(10, 50.0)])
    kept = RANGES["percentile"](*histogram(values), UINT8)
    assert max(np.abs(kept)) == pytest.approx(1, abs=50 / BINS)
    kept = RANGES["percentile"](*histogram(np.append(values, 50.0 * side)), UINT8)
    assert max(np.abs(kept)) == 50  # one more is too many


@pytest.mark.parametrize("config", [UINT8, SEVEN_BITS, INT16])
def test_a_lone_outlier_is_clipped_as_the_methods_say(config):
    # One of n values is 100, and clipping it at c costs (100 - c)^2. Rounding the others to l steps
    # costs n (c / l)^2 / 12, because none is near 0. The sum is least where
    # 100 - c = n c / (12 l^2).
    values = np.concatenate([np.random.default_rng(0).uniform(1, 3, 200_000), [100.0]])
    steps = 2**15 - 1 if config.symmetric else config.steps
    best = 100 / (1 + len(values) / (12 * steps**2))
    assert RANGES["mse"](*histogram(values), config)[1] == pytest.approx(
        best, abs=100 / len(calibration.SHARES)
    )
    assert RANGES["percentile"](*histogram(values), config)[1] < 6


@pytest.mark.parametrize("method", RANGES)
def test_16_bits_hardly_clip_by_any_method(method):
    values = np.random.default_rng(0).standard_normal(200_000)
    low, high = RANGES[method](*histogram(values), INT16)
    assert (
        0.85 * values.max() <= high <= np.abs(values).max()
        and 0.85 * values.min() >= low >= -np.abs(values).max()
    )


def test_there_are_three_methods():
    assert set(RANGES) == {"minmax", "percentile", "mse"}


# ---- ranges of tensors


@pytest.mark.parametrize("method", RANGES)
@pytest.mark.parametrize("config", ALL)
def test_a_tensor_of_zeros_has_a_range(method, config):
    low, high = observed(torch.zeros(4, 3, 8, 8)).range(method, config)
    assert (low, high) == (-1 if config.symmetric else 0, 1)
    scale, zero_point = calibration.numbers(low, high, config)
    assert scale > 0 and zero_point == (
        0 if config.symmetric else torch.iinfo(config.activation).min
    )


@pytest.mark.parametrize("method", RANGES)
@pytest.mark.parametrize("config", ALL)
def test_a_silent_channel_may_wake_up(method, config):
    images = noise(8, 8) * torch.tensor([1, 10, 0]).view(1, 3, 1, 1)
    low, high = observed(images, channelwise=True).range(method, config)
    assert low.shape == high.shape == (3,)
    assert (low[2], high[2]) == (calibration.SILENT * low[1], calibration.SILENT * high[1])
    assert high[0] < 0.2 * high[1]  # channels that are heard have their ranges


def test_a_quiet_channel_loses_nothing_of_its_range():
    """The widest channel has no negative values, the quiet one has."""
    images = noise(8, 8)
    images[:, 1] = 5000 * images[:, 1].abs()
    low, high = observed(images, channelwise=True).range("minmax", UINT8)
    assert low[0] == images[:, 0].min().item() and low[1] == 0
    assert high[0] == calibration.SILENT * high[1] > images[:, 0].max().item()


def test_without_zero_points_the_ends_are_equal():
    values = noise(8, 8).clamp(-0.5, 3)
    for method in RANGES:
        low, high = observed(values).range(method, SYMMETRIC)
        assert low == -high and 0 < high <= values.max().item()
    assert observed(values).range("minmax", SYMMETRIC)[1] == values.max().item()


# ---- numbers


def numbers(low: np.ndarray, high: np.ndarray, config: QDQConfig) -> list[float]:
    """Return the scale and the zero-point of one range."""
    return [number.item() for number in calibration.numbers(low, high, config)]


def test_numbers_by_hand():
    ends = np.array([-1.0]), np.array([4.0])
    assert numbers(*ends, UINT8) == pytest.approx([5 / 255, 51])
    assert numbers(*ends, SEVEN_BITS) == pytest.approx([5 / 127, 25])  # 25.4
    assert numbers(*ends, QDQConfig("outputs", torch.int8)) == pytest.approx([5 / 255, 51 - 128])
    ends = np.array([-4.0]), np.array([4.0])
    assert numbers(*ends, SYMMETRIC) == pytest.approx([4 / 127, 0])
    assert numbers(*ends, INT16) == pytest.approx([4 / 32767, 0])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-4.0, 4.0, (4 / 127, 128)),
        (-5.12, 5.0, (5.12 / 128, 128)),  # the low end is the lowest integer
        (-4.0, 5.5, (5.5 / 127, 128)),  # steps 1.16 times as wide
        (-1.0, 4.0, (5 / 255, 51)),  # they would be 1.6 times as wide
        (0.0, 4.0, (4 / 255, 0)),
    ],
)
def test_nearly_symmetric_ranges_are_centred_where_the_configuration_says_so(low, high, expected):
    config = QDQConfig("inputs", centred=True)
    assert numbers(np.array([low]), np.array([high]), config) == pytest.approx(expected)


def test_channels_with_scales_apart_are_not_centred_and_the_middle_of_seven_bits_is_64():
    two = np.array([-4.0, -4.0]), np.array([4.0, 4.1])
    centred = calibration.numbers(*two, QDQConfig("inputs", centred=True))
    plain = calibration.numbers(*two, QDQConfig("inputs"))
    assert torch.equal(centred[0], plain[0]) and torch.equal(centred[1], plain[1])
    ends = np.array([-4.0]), np.array([4.1])
    seven = QDQConfig("inputs", centred=True, steps=127)
    assert numbers(*ends, seven) == pytest.approx([4.1 / 63, 64])


@pytest.mark.parametrize("config", ALL)
def test_numbers_span_the_range_and_have_a_zero(config):
    low, high = -np.array([0, 1, 3.7, 1e-3]), np.array([2, 0, 1.1, 5])
    if config.symmetric:
        low = -high
    scale, zero_point = calibration.numbers(low, high, config)
    assert (
        scale.dtype == torch.float32
        and zero_point.dtype == torch.int64
        and scale.shape == zero_point.shape == (4,)
    )
    lowest = torch.iinfo(config.activation).min
    steps = 2 * torch.iinfo(config.activation).max if config.symmetric else config.steps
    ends = [(zero_point - lowest), steps - (zero_point - lowest)]  # steps below zero and above it
    if not config.symmetric:
        for count, end in zip(ends, (low, high), strict=True):
            assert (count >= 0).all() and np.all(
                np.abs(count.numpy() * scale.numpy() - np.abs(end)) <= 0.501 * scale.numpy()
            )
    assert np.allclose(scale.numpy() * steps, high - low)


def test_a_single_range_has_no_dimension():
    scale, zero_point = calibration.numbers(np.array([-1.0]), np.array([1.0]), UINT8)
    assert scale.shape == zero_point.shape == ()


# ---- networks


@pytest.fixture(scope="module")
def model():
    return small(Everything)


IMAGES = noise(40, 33)


@torch.no_grad()
def ends(model, name):
    """Return the ends of the first output of module `name` of the folded model."""
    network, seen = folded(model), []
    network.get_submodule(name).register_forward_hook(
        lambda _m, _i, output: seen.append((output.min().item(), output.max().item()))
    )
    network(IMAGES)
    return min(seen[0][0], 0), max(seen[0][1], 0)


def test_every_pair_has_the_range_of_its_tensor(model):
    chosen = calibration.calibrate(folded(model), IMAGES, UINT8, RECIPE)
    for qdq, module in (
        ("qdq_stem", "relu"),
        ("qdq_conv", "conv"),
        ("qdq_squeeze", "squeeze"),
        ("qdq_head", "head"),
    ):
        low, high = ends(model, module)
        assert chosen[qdq][0].item() == pytest.approx((high - low) / 255)
        assert chosen[qdq][1].item() == round(-low / (high - low) * 255)
    assert chosen["qdq_x"][0].item() == pytest.approx((IMAGES.max() - IMAGES.min()).item() / 255)
    assert len(chosen) == 17


def test_headroom_widens_all_ranges(model):
    plain = calibration.calibrate(folded(model), IMAGES, INT16, RECIPE.replace(ranges="percentile"))
    wide = calibration.calibrate(
        folded(model), IMAGES, INT16, RECIPE.replace(ranges="percentile", headroom=4.0)
    )
    assert all(wide[name][0].item() == pytest.approx(4 * plain[name][0].item()) for name in plain)


def test_methods_that_clip_give_finer_steps(model):
    steps = {
        method: calibration.calibrate(
            folded(model),
            IMAGES,
            dataclasses.replace(UINT8, steps=31),
            RECIPE.replace(ranges=method),
        )
        for method in RANGES
    }
    for name, (widest, _) in steps["minmax"].items():
        assert max(steps["mse"][name][0], steps["percentile"][name][0]) <= widest
    assert steps["mse"]["qdq_x"][0] < 0.9 * steps["minmax"]["qdq_x"][0]  # normal noise at 5 bits


def test_shared_and_fixed_scales(model):
    config = QDQConfig("outputs", torch.int8, pooling_keeps_scale=True, unit_gates=True)
    chosen = calibration.calibrate(folded(model), IMAGES, config, RECIPE)
    assert (
        chosen["qdq_squeeze"] == chosen["qdq_swish_1"]
        and chosen["qdq_squeeze_1"] == chosen["qdq_project"]
    )
    assert [n.item() for n in chosen["qdq_gate"]] == [1 / 256, -128]
    free = calibration.calibrate(folded(model), IMAGES, QDQConfig("outputs", torch.int8), RECIPE)
    assert free["qdq_squeeze"] != chosen["qdq_squeeze"] and free["qdq_gate"][0] < 1 / 255


def test_a_scale_for_each_channel(model):
    chosen = calibration.calibrate(
        folded(model), IMAGES, QDQConfig("outputs", scales="needed"), RECIPE
    )
    assert {name for name, (scale, _) in chosen.items() if scale.ndim} == {"qdq_swish"}
    assert chosen["qdq_swish"][0].shape == chosen["qdq_swish"][1].shape == (8,)
    one = calibration.calibrate(folded(model), IMAGES, UINT8, RECIPE)["qdq_swish"][0]
    assert chosen["qdq_swish"][0].max() <= one < 1.2 * chosen["qdq_swish"][0].max()


def test_what_stays_in_fp32_is_not_calibrated(model):
    chosen = calibration.calibrate(
        folded(model), IMAGES, UINT8, RECIPE.replace(keep_fp32=("reduce", "excite"))
    )
    assert "qdq_reduce" not in chosen and "qdq_excite" in chosen


def test_the_float_network_is_left_alone(model):
    network = folded(model)
    before = copy.deepcopy(network.state_dict())
    calibration.calibrate(network, IMAGES, UINT8, RECIPE.replace(ranges="mse"))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(isinstance(module, Observer) for module in network.modules())


@pytest.mark.parametrize(
    ("reader", "low", "high"),
    [(nn.Hardswish, -3, None), (nn.Hardsigmoid, -3, 3), (nn.Identity, None, None)],
)
def test_a_range_ends_where_its_reader_is_flat(reader, low, high):
    torch.manual_seed(0)
    network, images = (
        folded(nn.Sequential(nn.Conv2d(3, 2, 1), reader(), nn.Conv2d(2, 2, 1)).eval()),
        20 * noise(4, 8),
    )
    with torch.no_grad():
        values = network.get_submodule("0")(images)
    assert values.min() < -4 and values.max() > 4
    scale, zero_point = calibration.calibrate(network, images, UINT8, RECIPE)["qdq__0"]
    ends = -zero_point * scale, (255 - zero_point) * scale
    expected = values.min() if low is None else low, values.max() if high is None else high
    assert ends == pytest.approx([float(end) for end in expected], abs=float(scale))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", RANGES)
def test_values_that_are_not_finite_are_told_with_their_place(method, value):
    network = folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)))
    with torch.no_grad():
        network.get_submodule("3").bias[1] = value
    with pytest.raises(
        UserError,
        match=r"calibration: the FP32 network gives infinite values or NaN at \w+; train it again",
    ):
        calibration.calibrate(
            network, noise(4, 8), QDQConfig("outputs"), RECIPE.replace(ranges=method)
        )
