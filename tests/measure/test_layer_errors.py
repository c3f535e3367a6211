"""SQNR by layer: known answers, and the same layers for every engine."""

import math

import pytest
import torch
from torch import nn

from utils import metrics
from utils.backends import registry
from utils.backends.base import Deployed, plain_layers, stored_parameters
from utils.measure import layer_errors
from utils.quantize.exact import ExactInterpreter
from utils.quantize.layers import outputs

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.conv, self.act = nn.Conv2d(8, 4, 3), nn.Hardswish(inplace=True)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.act(self.conv(self.stem(x)))), 1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Small().eval()
    model.architecture = "small"
    return model


def test_a_known_error_in_a_weight_by_hand():
    """Weights a tenth too large: 20 dB for the layer's weights, 20 dB for its output, and for the next one's, without bias."""
    fp32 = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    network.load_state_dict(fp32.state_dict())
    with torch.no_grad():
        network[0].weight *= 1.1
    deployed = Deployed(
        None, None, stored_parameters(network), network, network, plain_layers(network), fp32
    )
    first, second = layer_errors.errors(deployed, torch.randn(5, 3))
    assert first["weight_sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert first["output_sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert second["weight_sqnr_db"] is None  # no difference
    assert second["output_sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert [(row["layer"], row["kind"], row["parameters"]) for row in (first, second)] == [
        ("0", "Linear", 12),
        ("1", "Linear", 8),
    ]


def test_without_conversion_there_is_nothing_to_compare():
    network = nn.Sequential(nn.Linear(3, 2))
    deployed = Deployed(
        None, None, stored_parameters(network), network, network, plain_layers(network)
    )
    assert layer_errors.errors(deployed, torch.randn(5, 3)) == []


RECIPES = {
    "fbgemm": dict(bits=8, ranges="minmax", bias_correction=False, keep_fp32=()),
    "onnxruntime": dict(
        bits=8, ranges="minmax", bias_correction=False, keep_fp32=()
    ),  # torch does not run it
    "simulated": dict(bits=16, ranges="minmax", headroom=1.0),
    "half": {},
    "amp": {},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_engine_reports_the_same_layers_with_sqnr_that_its_bits_allow(model, name):
    rows = layer_errors.errors(registry.get(name).quantize(model, IMAGES, RECIPES[name]), IMAGES)
    assert [row["layer"] for row in rows] == ["stem.0", "conv", "fc"]
    low, high = {
        "fbgemm": (20, 60),
        "onnxruntime": (20, 60),
        "simulated": (70, 130),
        "half": (50, 90),
        "amp": (50, 90),
    }[name]
    for row in rows:
        assert low < row["output_sqnr_db"] < high
        if name == "amp":
            assert row["weight_sqnr_db"] is None  # the file holds FP32
        else:
            assert low < row["weight_sqnr_db"] < high


def test_outputs_of_integer_networks_are_those_of_exact_execution(model):
    """The engine that lowers it plays no part: here it does not even run."""
    deployed = registry.get("onnxruntime").quantize(model, IMAGES, RECIPES["onnxruntime"])
    assert deployed.predict is None and deployed.layers == {}
    seen, expected = {}, {}
    with torch.no_grad():
        ExactInterpreter(
            deployed.quantized, lambda name, output: seen.update({name: output.float()})
        ).run(IMAGES.double())
        float_layers = {name: deployed.fp32.get_submodule(name) for name in seen}
        with outputs(float_layers) as expected:
            deployed.fp32(IMAGES)
    for row in layer_errors.errors(deployed, IMAGES):
        name = row["layer"]
        assert row["output_sqnr_db"] == metrics.sqnr_db(expected[name].numpy(), seen[name].numpy())
        weight = float_layers[name].weight.detach().numpy()
        assert row["weight_sqnr_db"] == metrics.sqnr_db(
            weight, deployed.quantized.layers[name].values().numpy()
        )


def test_layers_kept_in_fp32_have_no_error_in_their_weights(model):
    recipe = RECIPES["fbgemm"] | dict(keep_fp32=("stem",))
    first, second, _ = layer_errors.errors(
        registry.get("fbgemm").quantize(model, IMAGES, recipe), IMAGES
    )
    assert first["weight_sqnr_db"] is None
    assert first["output_sqnr_db"] is None or first["output_sqnr_db"] > 100
    assert 20 < second["weight_sqnr_db"] < 60


def test_eight_bits_have_the_sqnr_of_the_formula(model):
    """Uniform weights in +-max at scale max/127: power max^2/3 over scale^2/12."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 64, 8, bias=False)
    nn.init.uniform_(conv.weight, -1, 1)
    model = nn.Sequential(conv).eval()
    (row,) = layer_errors.errors(
        registry.get("fbgemm").quantize(model, IMAGES, RECIPES["fbgemm"]), IMAGES
    )
    assert row["weight_sqnr_db"] == pytest.approx(10 * math.log10(4 * 127**2), abs=0.5)
