"""Engines run equalized networks: hardswish between factors, or scales for some channels."""

import pytest
import torch
from small_networks import RECIPE, images, quantized
from torch import nn

from utils import metrics
from utils.backends import registry
from utils.quantize import equalization
from utils.quantize.exact import execute
from utils.quantize.operators import ScaledHardswish

ONE_SCALE = ("fbgemm", "x86", "onednn", "qnnpack", "onnxruntime", "xnnpack")  # for each tensor
MANY_SCALES = ("openvino", "inductor")  # they can have one for each channel


class Outlier(nn.Module):
    """A stem with one channel `factor` times larger, which the depthwise convolution evens out."""

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
    """A depthwise convolution after ReLU, whose channels become even, and an `Outlier`."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 16, 8, stride=8), nn.ReLU()
        self.even = nn.Conv2d(16, 16, 3, groups=16)
        self.outlier = Outlier(nn.Conv2d(16, 16, 1), 1e4)

    def forward(self, x):
        return self.outlier(self.even(self.relu(self.stem(x))))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Outlier(nn.Conv2d(3, 16, 8, stride=8), 100.0).eval()


def engine_called(name):
    engine = registry.get(name)
    if problem := engine.problem():
        pytest.skip(problem)
    return engine


def check(engine, network, model, x, path):
    """Write `network` to `path`: the file agrees with exact execution, and that with `model`."""
    engine.lower(network, path)
    answers = engine.load(path, "cpu")(x.contiguous(memory_format=engine.layout))
    expected = execute(network, x).numpy()
    assert metrics.sqnr_db(expected, answers.numpy()) > 30
    assert metrics.sqnr_db(model(x).numpy(), expected) > 25


@pytest.mark.parametrize("name", ONE_SCALE)
@torch.no_grad()
def test_the_engine_answers_as_exact_execution(model, name, tmp_path):
    engine, x = engine_called(name), images()
    network = quantized(model, engine.qdq_config(RECIPE), x, equalize=True)
    assert any(isinstance(module, ScaledHardswish) for module in network.network.modules())
    check(engine, network, model, x, tmp_path / f"file{engine.suffix}")


@pytest.mark.parametrize("name", MANY_SCALES)
@torch.no_grad()
def test_one_scale_and_a_scale_for_each_channel_stand_in_one_file(name, tmp_path):
    engine, x = engine_called(name), images()
    torch.manual_seed(0)
    model = AfterBoth().eval()
    network = quantized(model, engine.qdq_config(RECIPE), x, equalize=True)
    scales = [network.input_scale(layer).numel() for layer in ("even", "outlier.depthwise")]
    assert scales == [1, 16]
    check(engine, network, model, x, tmp_path / f"file{engine.suffix}")
