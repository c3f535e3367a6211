"""INT16 as a backend: its file, loaded again, and the configuration that decides a training."""

import pytest
import torch
from helpers import Everything, deployed_on, noise, small

from utils import architectures, metrics
from utils.backends import registry
from utils.measure import footprint
from utils.quantize import layers
from utils.quantize.exact import execute
from utils.recipes import Int16

RECIPE = Int16(ranges="minmax", headroom=4.0, calibration_images=2)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(
    memory_format=torch.channels_last
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return architectures.build("mobilenetv3").eval()


@pytest.fixture(scope="module")
def deployed(model):
    return deployed_on("simulated", model, X, RECIPE)


def test_the_loaded_file_answers_as_before(deployed, tmp_path):
    deployed.save(tmp_path / "artifact")
    with torch.inference_mode():
        assert torch.equal(
            deployed.predict(X), registry.get("simulated").load(tmp_path / "artifact", "cpu")(X)
        )


@torch.inference_mode()
def test_the_simulation_answers_as_exact_execution():
    """FP32 keeps 24 bits of a sum; 16-bit hardware keeps all."""
    model, images = small(Everything), noise(8, 33)
    deployed = deployed_on("simulated", model, images, RECIPE)
    exact = execute(deployed.quantized, images).numpy()
    assert metrics.sqnr_db(exact, deployed.predict(images).numpy()) > 70
    assert metrics.sqnr_db(model(images).numpy(), exact) > 60
    for name in deployed.quantized.qdqs.source:
        qdq = deployed.quantized.qdq(name)
        assert qdq.dtype is torch.int16 and not qdq.zero_point.any()


def test_every_layer_is_seen_with_its_rounded_weights(model, deployed):
    quantized, fp32 = deployed.quantized.layers, layers.weighted(deployed.quantized.fp32)
    assert list(quantized) == list(layers.weighted(model)) == list(fp32)
    for name, layer in quantized.items():
        weight = fp32[name].weight
        step = weight.abs().flatten(1).amax(1) / 32767
        assert bool(((layer.values() - weight).abs().flatten(1).amax(1) <= 0.51 * step).all()), name


def test_the_numbers_of_the_file_are_weights_of_16_bits_and_biases_of_32(model, deployed):
    modules = layers.weighted(model).values()
    weights = sum(layer.weight.numel() for layer in modules)
    biases = sum(len(layer.weight) for layer in modules)  # at least BatchNorm gives one to each
    assert footprint.of_numbers(deployed.stored)["parameters"] == weights + biases
    assert {numbers.bits for numbers in deployed.stored if numbers.layer} == {16}
    assert {numbers.bits for numbers in deployed.stored if not numbers.layer} == {32}


def test_the_configuration_decides_what_is_trained():
    tag, config = registry.get("simulated").training_config(RECIPE)
    assert len(tag) == 6
    assert (config["activation"], config["weight"], config["bias"]) == ("int16", "int16", "float")
