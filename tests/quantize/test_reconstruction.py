"""Block reconstruction: the parts of a network, their training, and the gain of the whole."""

import pytest
import torch
from helpers import Everything, noise, small, sqnr_db
from quantize_helpers import FourBits
from torch import fx, nn

from utils.quantize import ptq, reconstruction, start_qat
from utils.quantize.exact import execute
from utils.quantize.fake_quant import to_integers
from utils.quantize.qdq_config import QDQConfig
from utils.quantize.reconstruction import Part, learn
from utils.recipes import Int8

CONFIGS = [
    FourBits("outputs"),
    QDQConfig("outputs", torch.int8, bias="int32", unit_gates=True),
    FourBits("inputs", scales="needed"),
]
RECIPE = Int8(ranges="minmax", calibration_images=32)
RECONSTRUCTED = RECIPE.replace(reconstruct=True)
IMAGES = noise(32, 33)


@pytest.fixture(scope="module")
def model():
    return small(Everything)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_without_learning_it_is_the_network_that_training_starts_from(model, config, monkeypatch):
    monkeypatch.setattr(reconstruction, "MOST_STEPS", 0)
    expected = to_integers(start_qat(model, IMAGES, RECIPE, config.in_training), (), config)
    assert ptq(model, IMAGES, RECONSTRUCTED, config).digest() == expected.digest()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_coarse_network_comes_nearer_to_the_float_one_on_other_images_too(
    model, config, monkeypatch
):
    others = noise(32, 33, seed=5)
    results = []
    for steps in (0, 100):
        monkeypatch.setattr(reconstruction, "MOST_STEPS", steps)
        results.append(ptq(model, IMAGES, RECONSTRUCTED, config))
    with torch.no_grad():
        before, after = (sqnr_db(model(others), execute(result, others)) for result in results)
    # With 8 bits this network has 49.0 to 49.2 dB. Whether it gains depends on the processor.
    assert after > before + (1 if isinstance(config, FourBits) else -0.5)
    assert ptq(model, IMAGES, RECONSTRUCTED, config).digest() == results[1].digest()


def test_layers_in_fp32_do_not_learn(model):
    result = ptq(model, IMAGES, RECONSTRUCTED.replace(keep_fp32=("stem", "relu")), CONFIGS[0])
    assert "stem" not in result.layers
    assert torch.equal(
        result.network.get_submodule("stem").weight, result.fp32.get_submodule("stem").weight
    )


def part_of(layer):
    """Return a part of one layer, with inputs and the outputs of another layer as targets."""
    torch.manual_seed(0)
    network = fx.symbolic_trace(nn.Sequential(layer))
    x, target = torch.randn(320, 3), nn.Linear(3, 2)
    with torch.no_grad():
        layer.load_state_dict({name: value + 0.02 for name, value in target.state_dict().items()})
        return (
            Part(network, [node for node in network.graph.nodes if node.op == "call_module"]),
            x,
            target(x),
        )


def error(part, x, wanted):
    return (part.answers([x])[0] - wanted).square().mean().item()


def test_a_part_learns_its_target():
    part, x, wanted = part_of(nn.Linear(3, 2))
    before = error(part, x, wanted)
    learn(part, [x], [wanted])
    assert error(part, x, wanted) < 0.01 * before


def test_training_that_makes_a_part_worse_is_undone(monkeypatch):
    part, x, wanted = part_of(nn.Linear(3, 2))
    before = error(part, x, wanted)
    monkeypatch.setattr(reconstruction, "RATE", 1e3)
    monkeypatch.setattr(reconstruction, "MOST_STEPS", 1)
    learn(part, [x], [wanted])
    assert error(part, x, wanted) == before
