"""SQNR per layer: known answers, and the same layers for every engine."""

import math

import pytest
import torch
from helpers import deployed_on
from torch import nn

from utils import metrics
from utils.backends.base import Converted, Deployed, Lowered, float_layers
from utils.measure import layer_errors
from utils.quantize.exact import ExactInterpreter
from utils.quantize.layers import outputs
from utils.recipes import Fp16, Int8, Int16

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
    """Weights a tenth too large: 20 dB for them, their layer's output and the next output."""
    fp32 = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    network.load_state_dict(fp32.state_dict())
    with torch.no_grad():
        network[0].weight *= 1.1
    layers = float_layers(network)
    deployed = Converted(backend=None, stored=(), predict=network, layers=layers, fp32=fp32)
    first, second = layer_errors.errors(deployed, torch.randn(5, 3))
    assert first["weight_sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert first["output_sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert second["weight_sqnr_db"] is None  # no difference
    assert second["output_sqnr_db"] == pytest.approx(20, abs=1e-3)
    facts = [(row["layer"], row["kind"], row["parameters"]) for row in (first, second)]
    assert facts == [("0", "Linear", 12), ("1", "Linear", 8)]


def test_without_conversion_there_is_nothing_to_compare():
    network = nn.Sequential(nn.Linear(3, 2))
    deployed = Deployed(backend=None, stored=(), predict=network, network=network)
    assert layer_errors.errors(deployed, torch.randn(5, 3)) == []


INT8 = Int8(ranges="minmax", calibration_images=8)
INT16 = Int16(ranges="minmax", calibration_images=8)


@pytest.mark.parametrize(
    ("name", "recipe", "low", "high"),
    [
        ("fbgemm", INT8, 20, 60),
        ("onnxruntime", INT8, 20, 60),  # which torch does not run
        ("simulated", INT16, 70, 130),
        ("half", Fp16(), 50, 90),
        ("amp", Fp16(), 50, 90),
    ],
)
def test_every_engine_has_the_same_layers_with_the_sqnr_of_its_bits(model, name, recipe, low, high):
    rows = layer_errors.errors(deployed_on(name, model, IMAGES, recipe), IMAGES)
    assert [row["layer"] for row in rows] == ["stem.0", "conv", "fc"]
    for row in rows:
        assert low < row["output_sqnr_db"] < high
        if name == "amp":
            assert row["weight_sqnr_db"] is None  # the file holds FP32
        else:
            assert low < row["weight_sqnr_db"] < high


def test_outputs_of_integer_networks_come_from_exact_execution(model):
    """The engine does not matter: here it does not even run."""
    deployed = deployed_on("onnxruntime", model, IMAGES, INT8)
    assert isinstance(deployed, Lowered) and deployed.predict is None
    exact, fp32 = {}, deployed.quantized.fp32

    def keep(name, output):
        exact[name] = output.float()

    with torch.no_grad():
        ExactInterpreter(deployed.quantized, keep).run(IMAGES.double())
        layers = {name: fp32.get_submodule(name) for name in exact}
        with outputs(layers) as expected:
            fp32(IMAGES)
    for row in layer_errors.errors(deployed, IMAGES):
        name = row["layer"]
        assert row["output_sqnr_db"] == metrics.sqnr_db(expected[name].numpy(), exact[name].numpy())
        weight = layers[name].weight.detach().numpy()
        integers = deployed.quantized.layers[name].values().numpy()
        assert row["weight_sqnr_db"] == metrics.sqnr_db(weight, integers)


def test_layers_kept_in_fp32_have_no_error_in_their_weights(model):
    deployed = deployed_on("fbgemm", model, IMAGES, INT8.replace(keep_fp32=("stem",)))
    first, second, _ = layer_errors.errors(deployed, IMAGES)
    assert first["weight_sqnr_db"] is None
    assert first["output_sqnr_db"] is None or first["output_sqnr_db"] > 100
    assert 20 < second["weight_sqnr_db"] < 60


def test_eight_bits_have_the_sqnr_of_the_formula(model):
    """Uniform weights in +-max at scale max/127: power max^2/3 over scale^2/12."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 64, 8, bias=False)
    nn.init.uniform_(conv.weight, -1, 1)
    model = nn.Sequential(conv).eval()
    (row,) = layer_errors.errors(deployed_on("fbgemm", model, IMAGES, INT8), IMAGES)
    assert row["weight_sqnr_db"] == pytest.approx(10 * math.log10(4 * 127**2), abs=0.5)
