"""Engines run networks as equalization leaves them: hardswish between factors, or scales for some channels."""

import pytest
import torch
from small_networks import RECIPE, images
from torch import nn

from utils import metrics
from utils.backends import registry
from utils.quantize import equalization, ptq
from utils.quantize.exact import execute
from utils.quantize.operators import ScaledHardswish

ENGINES = (
    "fbgemm",
    "x86",
    "onednn",
    "qnnpack",
    "onnxruntime",
    "xnnpack",
)  # those with one scale for each tensor
SCALES = ("openvino", "inductor")  # those that can have a scale for each channel


class Outlier(nn.Module):
    """A stem with one channel `factor` times as large as the others, which the depthwise convolution evens out."""

    def __init__(self, stem, factor):
        super().__init__()
        self.stem, self.swish = stem, nn.Hardswish()
        self.depthwise, self.pool = nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 2)
        uneven = torch.tensor([factor, *[1.0] * 15])
        equalization.divide(self.stem, 1 / uneven)
        equalization.multiply(self.depthwise, 1 / uneven)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.depthwise(self.swish(self.stem(x)))), 1))


class AfterBoth(nn.Module):
    """A depthwise convolution after ReLU, whose channels become even, and one after hardswish with a large channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu, self.even = (
            nn.Conv2d(3, 16, 8, stride=8),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=16),
        )
        self.outlier = Outlier(nn.Conv2d(16, 16, 1), 1e4)

    def forward(self, x):
        return self.outlier(self.even(self.relu(self.stem(x))))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Outlier(nn.Conv2d(3, 16, 8, stride=8), 100.0).eval()


def check(engine, quantized, model, x, path):
    """The file at `path`, which is written, answers as the exact reference, which is near `model`."""
    engine.lower(quantized, path)
    answers = engine.load(path, "cpu")(x.contiguous(memory_format=engine.layout))
    expected = execute(quantized, x).numpy()
    assert metrics.sqnr_db(expected, answers.numpy()) > 30
    assert metrics.sqnr_db(model(x).numpy(), expected) > 25


@pytest.mark.parametrize("name", ENGINES)
@torch.no_grad()
def test_the_engine_answers_as_the_exact_reference(model, name, tmp_path):
    engine, x = registry.get(name), images()
    if problem := engine.problem():
        pytest.skip(problem)
    quantized = ptq.quantize(model, x, RECIPE | {"equalize": True}, engine.qdq_config({"bits": 8}))
    assert any(isinstance(module, ScaledHardswish) for module in quantized.network.modules())
    check(engine, quantized, model, x, tmp_path / f"file{engine.suffix}")


@pytest.mark.parametrize("name", SCALES)
@torch.no_grad()
def test_one_scale_and_a_scale_for_each_channel_stand_in_one_file(name, tmp_path):
    engine, x = registry.get(name), images()
    if problem := engine.problem():
        pytest.skip(problem)
    torch.manual_seed(0)
    model = AfterBoth().eval()
    quantized = ptq.quantize(model, x, RECIPE | {"equalize": True}, engine.qdq_config({"bits": 8}))
    assert [quantized.input_scale(layer).numel() for layer in ("even", "outlier.depthwise")] == [
        1,
        16,
    ]
    check(engine, quantized, model, x, tmp_path / f"file{engine.suffix}")
