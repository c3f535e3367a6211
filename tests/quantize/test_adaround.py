"""AdaRound: errors of weights that cancel, and layers that never get worse."""

import copy

import pytest
import torch
from helpers import Everything, noise, small, sqnr_db
from quantize_helpers import FourBits
from torch import nn

from utils.quantize import adaround, ptq
from utils.quantize.exact import execute
from utils.quantize.modules import QuantizedLayer, by_output
from utils.recipes import Int8

FOUR_BITS = FourBits("inputs")
RECIPE = Int8(ranges="minmax", calibration_images=32)
IMAGES = noise(32, 33)
torch.manual_seed(0)
LAYERS = {
    "plain": nn.Conv2d(4, 6, 3),
    "pointwise": nn.Conv2d(4, 6, 1),
    "stride, padding, dilation": nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2)),
    "groups": nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "linear": nn.Linear(20, 5),
}


def quantized_layer(layer, config=FOUR_BITS):
    result = QuantizedLayer(layer, config)
    result.quantize(layer, torch.tensor(1.0))
    return result


def inputs_for(layer):
    """Inputs with correlated values, as in images."""
    generator = torch.Generator().manual_seed(0)
    shape = (64, 20) if isinstance(layer, nn.Linear) else (8, 4, 9, 11)
    return 2 + torch.randn(shape, generator=generator)


def adapted(layer, x, count=64):
    """Return the adapted layer, with the inputs and the float outputs that it was adapted to."""
    result = quantized_layer(layer)
    inputs = adaround.inputs_at(result, x.double(), count)
    outputs = adaround.outputs_at(layer(x).detach(), count)
    adaround.adapt_layer(result, layer.weight.detach(), inputs, outputs)
    return result, inputs, outputs


def test_one_of_two_equal_weights_is_rounded_up_where_their_inputs_are_equal():
    """0.45 a + 0.35 a is nearer to a than to 0, but the nearest integers of both weights are 0."""
    layer = nn.Linear(3, 1, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[7.0, 0.45, 0.35]]))
    x = torch.stack([torch.zeros(50), *[torch.linspace(-1, 1, 50)] * 2], 1)
    result, _, _ = adapted(layer, x)
    assert quantized_layer(layer).weight.tolist() == [[7, 0, 0]]
    assert result.weight.tolist() == [[7, 1, 0]]


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_an_output_comes_from_its_inputs(name):
    layer = LAYERS[name]
    x = inputs_for(layer)
    inputs = adaround.inputs_at(quantized_layer(layer), x, 30)
    outputs = adaround.outputs_at(layer(x), 30)
    # (groups, out of a group, inputs)
    weight = layer.weight.flatten(1).unflatten(0, (inputs.shape[1], -1))
    expected = torch.einsum("ngi,goi->ngo", inputs, weight).flatten(1)
    if layer.bias is not None:
        expected += layer.bias
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_no_channel_is_worse_than_by_the_nearest_integers_which_stay_neighbours(name):
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name])
    result, inputs, outputs = adapted(layer, inputs_for(layer))
    errors = []
    for quantized in (result, quantized_layer(layer)):
        weight = quantized.values().flatten(1).unflatten(0, (inputs.shape[1], -1))
        given = torch.einsum("ngi,goi->ngo", inputs, weight).flatten(1) + quantized.bias
        errors.append((given - outputs).square().mean(0))
    assert (errors[0] <= 1.0001 * errors[1]).all() and errors[0].sum() < errors[1].sum()
    exact = layer.weight / by_output(result.scale, layer.weight)
    assert (result.weight - exact).abs().max() < 1.001
    assert result.weight.abs().max() <= 7


@torch.no_grad()
def test_a_network_of_four_bits_comes_nearer_to_the_float_one():
    model = small(Everything)
    results = [
        ptq(model, IMAGES, RECIPE.replace(adaround=adapt), FOUR_BITS) for adapt in (False, True)
    ]
    nearest, adaptive = (sqnr_db(model(IMAGES), execute(result, IMAGES)) for result in results)
    assert adaptive > nearest + 3
    for name, layer in results[1].layers.items():
        assert torch.equal(layer.scale, results[0].layers[name].scale)
        assert torch.equal(layer.bias, results[0].layers[name].bias)
    again = ptq(model, IMAGES, RECIPE.replace(adaround=True), FOUR_BITS)
    assert again.digest() == results[1].digest()


def test_no_single_exchange_would_lower_the_error_any_more(monkeypatch):
    monkeypatch.setattr(adaround, "SWEEPS", 1000)
    torch.manual_seed(0)
    x = 1 + torch.randn(300, 150, dtype=torch.float64)
    target = torch.randn(300, 4, dtype=torch.float64)
    low = torch.floor(torch.randn(1, 4, 150, dtype=torch.float64))
    chosen = adaround.descend(low, low + 1, (x.T @ x)[None], (target.T @ x)[None])[0]

    def errors(weights):
        return (x @ weights.T - target).square().sum(0)

    assert set((chosen - low[0]).unique().tolist()) == {0, 1}
    assert (errors(chosen) < 0.2 * errors(low[0])).all()
    for column in range(150):
        exchanged = chosen.clone()
        exchanged[:, column] = 2 * low[0, :, column] + 1 - chosen[:, column]
        assert (errors(exchanged) >= errors(chosen) - 1e-6).all()
