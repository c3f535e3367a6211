"""Bias correction on float graphs that stand for quantized ones; with real engines it is tested in test_torch_ao.py."""

import copy

import pytest
import torch
from torch import fx, nn

from utils.quantize import layers
from utils.quantize.bias_correction import correct_biases


def traced(*modules):
    return fx.symbolic_trace(nn.Sequential(*modules)).eval()


@torch.no_grad()
def corrected(prepared, reference, images):
    """The biases of `prepared` after correction, by layer."""
    with layers.channel_means(prepared) as means:
        for batch in images.split(3):
            prepared(batch)
    correct_biases(prepared, reference, images, means)
    return [layer.bias for layer in prepared.children() if isinstance(layer, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_shifted_weight_is_made_up_for_by_the_bias(bias):
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 2, 1, bias=bias)
    images = torch.randn(8, 3, 4, 4) + torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    prepared = traced(conv, nn.ReLU())
    reference = copy.deepcopy(prepared)
    shift = torch.tensor([[0.5, 0.0, 0.0], [0.0, -0.25, 1.0]])
    reference.get_submodule("0").weight.data += shift.view(2, 3, 1, 1)
    before = prepared.get_submodule("0").bias.detach().clone() if bias else torch.zeros(2)
    weight = prepared.get_submodule("0").weight.detach().clone()
    [after] = corrected(prepared, reference, images)
    assert torch.allclose(after, before - shift @ images.mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(prepared.get_submodule("0").weight, weight)


def test_a_later_layer_sees_what_the_corrected_layers_before_it_give():
    torch.manual_seed(3)
    prepared = traced(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    reference = copy.deepcopy(prepared)
    reference.get_submodule("0").weight.data += 0.3
    before = [prepared.get_submodule(name).bias.detach().clone() for name in ("0", "1")]
    after = corrected(prepared, reference, torch.randn(8, 3, 4, 4) + 2)
    assert (after[0] - before[0]).abs().min() > 0.1
    assert torch.allclose(after[1], before[1], atol=1e-5)  # nothing is left to correct
