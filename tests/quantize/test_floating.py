"""Training in the units of QAT without integers: where it starts, and what it becomes."""

import copy

import numpy as np
import pytest
import torch
from helpers import Everything, noise, small
from quantize_helpers import fit
from torch import nn

from utils import metrics
from utils.quantize.fake_quant import RoundHalf
from utils.quantize.floating import floating, plain

IMAGES = noise(24, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


@torch.no_grad()
def test_without_rounding_training_starts_from_the_float_network(model):
    network = floating(model, IMAGES)
    torch.testing.assert_close(network(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    result = plain(network, model)
    torch.testing.assert_close(result(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_what_was_trained_without_rounding_becomes_the_float_network_again(model):
    network = fit(floating(model, IMAGES), IMAGES)
    result = plain(network, model)
    assert type(result) is Everything and list(result.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(result(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
        assert not np.allclose(result(IMAGES), model(IMAGES), atol=1e-2)


@torch.no_grad()
def test_fp16_trains_with_what_half_holds(model):
    network, seen = floating(model, IMAGES, half=True), []
    layer = network.stem
    weight, bias = layer.used()
    assert torch.equal(weight, layer.float_weight().half().float()) and torch.equal(
        bias, bias.half().float()
    )
    assert not torch.equal(weight, layer.float_weight())
    layer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    expected = nn.functional.conv2d(IMAGES.half().float(), weight, bias, stride=2)
    network(IMAGES)
    assert torch.equal(seen[0], expected.half().float())


def test_gradients_pass_the_rounding_to_fp16():
    x = torch.tensor([1 + 2**-12, 3e-9, -2.0], requires_grad=True)
    y = RoundHalf.apply(x)
    assert y.tolist() == [1.0, 0.0, -2.0]
    (y * torch.tensor([1e-9, 2.0, 3.0])).sum().backward()  # gradients of 1e-9 would be 0 in FP16
    assert x.grad.tolist() == pytest.approx([1e-9, 2.0, 3.0])


def test_what_was_trained_for_fp16_holds_its_numbers(model):
    result = plain(fit(floating(model, IMAGES, half=True), IMAGES), model)
    assert torch.equal(result.stem.weight, result.stem.weight.half().float())
    with torch.no_grad():
        half, full = copy.deepcopy(result).half()(IMAGES.half()).float(), result(IMAGES)
    assert metrics.sqnr_db(full.numpy(), half.numpy()) > 50
