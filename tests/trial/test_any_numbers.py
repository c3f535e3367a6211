"""Any weights and activations: integers and scales in their formats, or an error of one line."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from utils.errors import UserError
from utils.quantize import ptq
from utils.quantize.calibration import RANGES, Observer, numbers
from utils.quantize.exact import execute
from utils.quantize.modules import along_channels, by_output, quantize_weight
from utils.quantize.qdq_config import INTEGERS, NARROW_WEIGHT, QDQConfig
from utils.recipes import Int8

# Ordinary values, and values that break careless code: zeros, equal ones, denormals, outliers.
VALUES = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-38, 1e-20, 1e-7, 1e5, -1e10, 1e20, -3e30]),
)
ROWS = st.one_of(
    st.lists(VALUES, min_size=4, max_size=4),
    VALUES.map(lambda value: [value] * 4),  # a channel of one value
    st.just([0.0] * 4),
)
CHANNELS = st.lists(ROWS, min_size=1, max_size=5)
CONFIGS = st.sampled_from(
    [
        QDQConfig("outputs"),
        QDQConfig("outputs", steps=127),
        QDQConfig("inputs", centred=True),
        QDQConfig("outputs", torch.int8),
        QDQConfig("inputs", torch.int8, symmetric=True),
        QDQConfig("outputs", torch.int16, symmetric=True, steps=2**16 - 1),
    ]
)


@given(CHANNELS, st.sampled_from([NARROW_WEIGHT, 127, 2**15 - 1]), st.floats(0, 1e-3))
def test_any_weights_are_integers_with_scales(channels, highest, smallest):
    weight = torch.tensor(channels, dtype=torch.float32)
    integers, scale = quantize_weight(weight, highest, smallest)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(integers, integers.round()) and integers.abs().max() <= highest
    steps = by_output(scale, weight).double()
    # Half a step. The scale is rounded to float32, so the end of the range may lie this far beyond
    # the last integer.
    allowed = steps / 2 + weight.double().abs() * 2.0**-22
    assert ((integers.double() * steps - weight.double()).abs() <= allowed).all()


@given(CHANNELS, CONFIGS, st.sampled_from(sorted(RANGES)), st.booleans())
def test_any_activations_have_a_scale_and_a_zero_point(channels, config, method, channelwise):
    x = torch.tensor(channels, dtype=torch.float32).T[..., None, None]  # (images, channels, 1, 1)
    observer = Observer()
    observer.channelwise = channelwise
    observer(x)
    assume(torch.isfinite(observer.high - observer.low).all())
    if method != "minmax":
        observer.counts = torch.zeros(len(observer.low), 2048, dtype=torch.float64)
        observer(x)
    low, high = observer.range(method, config)
    assert np.isfinite([low, high]).all()
    assert (low <= 0).all() and (high >= 0).all() and (low < high).all()
    scale, zero_point = numbers(low, high, config)
    lowest, highest = INTEGERS[config.activation]
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (zero_point >= lowest).all() and (zero_point <= highest).all()
    if method == "minmax":
        # Nothing is clipped. Errors are within a step, half of it due to the zero-point.
        scale = along_channels(scale.double(), x)
        zero_point = along_channels(zero_point.double(), x)
        integers = torch.clamp(torch.round(x.double() / scale) + zero_point, lowest, highest)
        assert (((integers - zero_point) * scale - x.double()).abs() <= 1.001 * scale).all()


class Tiny(nn.Module):
    """Two layers with ReLU between them, one of them depthwise, and a linear one."""

    def __init__(self, weights):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)
        values = torch.tensor(weights, dtype=torch.float32)
        with torch.no_grad():
            self.conv.weight.copy_(values[:12].view(4, 3, 1, 1))
            self.depthwise.weight.copy_(values[12:16].view(4, 1, 1, 1))
            self.fc.weight.copy_(values[16:].view(2, 4))

    def forward(self, x):
        return self.fc(
            torch.flatten(self.pool(self.relu(self.depthwise(self.relu(self.conv(x))))), 1)
        )


RECIPES = [
    Int8(ranges="minmax", calibration_images=4),
    Int8(ranges="percentile", calibration_images=4),
    Int8(ranges="mse", calibration_images=4, weight_scales="tensor"),
    Int8(ranges="mse", calibration_images=4, equalize=True, adaround=True, bias_correction=True),
]


@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(
    st.lists(VALUES, min_size=24, max_size=24),
    CONFIGS,
    st.sampled_from(RECIPES),
    st.sampled_from([1.0, 0.0, 1e-20, 1e10]),
)
def test_any_network_gives_finite_answers_or_a_line(weights, config, recipe, scale):
    torch.manual_seed(0)
    images, model = scale * torch.randn(4, 3, 4, 4), Tiny(weights).eval()
    try:
        quantized = ptq(model, images, recipe, config)
    except UserError as error:
        assert len(str(error).split("\n")) == 1
        assert not torch.isfinite(model(images)).all() or "infinite" in str(error)
        return
    answers = execute(quantized, images)
    assert torch.isfinite(answers).all() and answers.shape == (4, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_and_infinity_are_an_error_of_one_line(bad, reconstruct, recipe):
    """In any weight and with any method."""
    if reconstruct:
        recipe = recipe.replace(reconstruct=True, adaround=False, bias_correction=False)
    for place in (0, 13, 20):
        model = Tiny([1.0] * place + [bad] + [0.5] * (23 - place)).eval()
        with pytest.raises(UserError, match="infinite"):
            ptq(model, torch.randn(4, 3, 4, 4), recipe, QDQConfig("outputs"))
