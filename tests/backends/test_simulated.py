"""INT16 as a backend: its file, loaded again, and the settings that decide a training."""

import pytest
import torch
from helpers import Everything, noise, small

from utils import architectures, metrics
from utils.backends import registry
from utils.measure import footprint
from utils.quantize import layers
from utils.quantize.exact import execute

RECIPE = dict(bits=16, activations="minmax", headroom=4.0, calibration_images=2)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(
    memory_format=torch.channels_last
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return architectures.build("mobilenetv3").eval()


@pytest.fixture(scope="module")
def deployed(model):
    return registry.get("simulated").quantize(model, X, RECIPE)


def test_the_loaded_file_answers_as_before(deployed, tmp_path):
    deployed.save(tmp_path / "artifact")
    with torch.inference_mode():
        assert torch.equal(
            deployed.predict(X), registry.get("simulated").load(tmp_path / "artifact", "cpu")(X)
        )


@torch.inference_mode()
def test_the_simulation_answers_as_exact_execution():
    """FP32 keeps 24 bits of a sum, which 16-bit hardware keeps whole."""
    model, images = small(Everything), noise(8, 33)
    deployed = registry.get("simulated").quantize(model, images, RECIPE)
    exact = execute(deployed.quantized, images).numpy()
    assert metrics.sqnr_db(exact, deployed.predict(images).numpy()) > 70
    assert metrics.sqnr_db(model(images).numpy(), exact) > 60
    for name in deployed.quantized.qdqs.source:
        assert (
            deployed.quantized.qdq(name).dtype is torch.int16
            and not deployed.quantized.qdq(name).zero_point.any()
        )


def test_every_layer_is_seen_with_its_rounded_weights(model, deployed):
    assert (
        list(deployed.quantized.layers)
        == list(layers.weighted(model))
        == list(layers.weighted(deployed.fp32))
    )
    for name, layer in deployed.quantized.layers.items():
        weight = layers.weighted(deployed.fp32)[name].weight
        step = weight.abs().flatten(1).amax(1) / 32767
        assert bool(((layer.values() - weight).abs().flatten(1).amax(1) <= 0.51 * step).all()), name


def test_the_numbers_of_the_file_are_weights_of_16_bits_and_biases_of_32(model, deployed):
    weights = sum(layer.weight.numel() for layer in layers.weighted(model).values())
    biases = sum(
        len(layer.weight) for layer in layers.weighted(model).values()
    )  # each has one, of BatchNorm if nothing else
    assert footprint.of_numbers(deployed.stored)["parameters"] == weights + biases
    assert {numbers.bits for numbers in deployed.stored if numbers.layer} == {16}
    assert {numbers.bits for numbers in deployed.stored if not numbers.layer} == {32}


def test_calibration_and_placement_decide_what_is_trained():
    tag, settings = registry.get("simulated").training(RECIPE | {"training": {"epochs": 2}})
    config = settings.pop("placement")
    assert len(tag) == 6 and settings == RECIPE
    assert (config["activation"], config["weight"], config["bias"]) == ("int16", "int16", "float")
