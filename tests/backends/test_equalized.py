"""Engines run a network whose hardswish stands between factors for each channel, as equalization leaves it."""

import pytest
import torch
from small_networks import RECIPE, images
from torch import nn

from utils import metrics
from utils.backends import registry
from utils.quantize import equalization, ptq
from utils.quantize.operators import ScaledHardswish
from utils.quantize.reference import execute

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack", "onnxruntime", "xnnpack")  # those with one scale for each tensor


class Outlier(nn.Module):
    """A stem with one channel 100 times as large as the others, which the depthwise convolution evens out."""

    def __init__(self):
        super().__init__()
        self.stem, self.swish = nn.Conv2d(3, 16, 8, stride=8), nn.Hardswish()
        self.depthwise, self.pool = nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 2)
        uneven = torch.tensor([100.0, *[1.0] * 15])
        equalization.divide(self.stem, 1 / uneven)
        equalization.multiply(self.depthwise, 1 / uneven)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.depthwise(self.swish(self.stem(x)))), 1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Outlier().eval()


@pytest.mark.parametrize("name", ENGINES)
@torch.no_grad()
def test_the_engine_answers_as_the_exact_reference(model, name, tmp_path):
    engine, x = registry.get(name), images()
    if problem := engine.problem():
        pytest.skip(problem)
    quantized = ptq.quantize(model, x, RECIPE | {"equalize": True}, engine.placement_by({"bits": 8}))
    assert any(isinstance(module, ScaledHardswish) for module in quantized.network.modules())
    engine.lower(quantized, tmp_path / f"file{engine.suffix}")
    answers = engine.load(tmp_path / f"file{engine.suffix}", "cpu")(x.contiguous(memory_format=engine.layout))
    expected = execute(quantized, x).numpy()
    assert metrics.sqnr_db(expected, answers.numpy()) > 30
    assert metrics.sqnr_db(model(x).numpy(), expected) > 25
