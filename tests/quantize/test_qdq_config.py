"""Q/DQ configurations: their description, 7 bits against overflow, and what training shares."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from helpers import SmallDepthwise, noise, small
from torch import nn

from utils.backends import registry
from utils.backends.lowering import Lowering
from utils.catalog import BACKENDS
from utils.quantize import ptq
from utils.quantize.qdq_config import INTEGERS, QDQConfig
from utils.recipes import Int8

OUTPUTS = QDQConfig("outputs")
RECIPE = Int8(ranges="minmax", calibration_images=8)
SETTINGS = [
    QDQConfig("outputs"),
    QDQConfig("inputs", scales="needed", rounded_sums=True, centred=True, float_logits=True),
    QDQConfig("outputs", torch.int8, pooling_keeps_scale=True, unit_gates=True, overflow="all"),
    QDQConfig("outputs", overflow="depthwise", overflow_fix="weights"),
    QDQConfig("outputs", torch.int16, torch.int16, "int32", True, 2**16 - 1, "apart"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_configuration_comes_back_from_its_description(settings):
    described = json.loads(json.dumps(settings.describe()))
    assert QDQConfig.of(described) == settings
    assert described["activation"] == str(settings.activation).removeprefix("torch.")
    assert QDQConfig.of(described | {"steps": 3}) != settings


def test_the_lowest_integer_of_a_weight_is_not_used():
    layer = nn.Linear(2, 2)
    assert (
        OUTPUTS.highest_weight(layer),
        QDQConfig("outputs", weight=torch.int16).highest_weight(layer),
    ) == (127, 32767)


def test_depthwise_weights_alone_have_seven_bits_where_only_their_products_overflow():
    overflowing = QDQConfig("outputs", overflow="depthwise")
    config = overflowing.fixed("weights")
    assert overflowing.fixed("activations") == config
    assert overflowing.fixed("none") == overflowing
    layers = (
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Linear(4, 4),
    )
    assert [config.highest_weight(layer) for layer in layers] == [64, 127, 127, 127]
    network = ptq(small(SmallDepthwise), noise(8, 32), RECIPE, config)
    assert {name: layer.weight.abs().max().item() for name, layer in network.layers.items()} == {
        "stem.0": 127, "depthwise.0": 64, "pointwise": 127, "head": 127,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fix", "steps", "highest"), [("activations", 127, 127), ("weights", 255, 64)]
)
def test_one_factor_of_products_that_overflow_has_seven_bits(fix, steps, highest):
    overflowing = QDQConfig("outputs", overflow="all")
    config = overflowing.fixed(fix)
    assert (config.steps, config.highest_weight(nn.Linear(2, 2))) == (steps, highest)
    assert 2 * steps * highest <= 2**15 - 1
    assert overflowing.fixed("none") == overflowing
    assert overflowing.highest_weight(nn.Linear(2, 2)) == 127
    assert OUTPUTS.fixed(fix) == OUTPUTS  # its products fit


def test_seven_bits_end_at_the_last_step():
    for dtype, limits in ((torch.uint8, (0, 127)), (torch.int8, (-128, -1))):
        config = QDQConfig("outputs", dtype, overflow="all")
        assert config.fixed("activations").limits == limits
        assert config.fixed("weights").limits == config.limits == INTEGERS[dtype]
    assert SETTINGS[-1].limits == INTEGERS[torch.int16]


class Gate(nn.Module):
    """A layer reads a hardsigmoid, or a product does."""

    def __init__(self, multiplies):
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 3, 1), nn.Hardsigmoid(), nn.Conv2d(3, 2, 1)
        self.multiplies = multiplies

    def forward(self, x):
        gate = self.gate(self.conv(x))
        return self.head(gate * x if self.multiplies else gate)


@pytest.mark.parametrize("multiplies", [True, False])
def test_hardsigmoid_has_eight_bits_only_if_no_layer_reads_them(multiplies):
    config = QDQConfig("outputs", unit_gates=True, overflow="all").fixed("activations")
    network = ptq(small(partial(Gate, multiplies)), 9 + noise(8, 32), RECIPE, config)
    gate, images = network.qdq("qdq_gate"), 99 + noise(8, 32)
    assert gate.limits == ((0, 255) if multiplies else (0, 127))
    assert (gate.numbers == (1 / 256, 0)) == multiplies
    read = [network.qdq(name) for name in network.qdqs.reads.values()]
    assert {pair.limits for pair in read} == {(0, 127)}
    assert gate(images).max() > 0.99  # 1 is among the numbers, or nearly


@pytest.mark.parametrize("fix", ["activations", "weights"])
def test_a_portable_network_has_the_fix_for_all_layers_on_every_processor(fix):
    expected = QDQConfig("outputs", overflow="all").fixed(fix)
    for overflow in ("none", "depthwise", "all"):
        assert QDQConfig("outputs", overflow=overflow).fixed(fix, portable=True) == expected


def test_integers_reach_from_the_lowest_to_the_highest_of_their_type():
    for dtype, ends in INTEGERS.items():
        assert ends == (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def test_training_rounds_as_uint8_and_leaves_biases_alone():
    deployed = QDQConfig(
        "outputs", torch.int8, bias="int32", steps=127, scales="needed", float_logits=True
    )
    assert deployed.in_training == QDQConfig("outputs", torch.uint8, steps=127, scales="needed")
    symmetric = QDQConfig("inputs", torch.int8, symmetric=True)
    assert symmetric.in_training == symmetric  # its zero-points are 0
    assert symmetric.in_training != dataclasses.replace(symmetric, symmetric=False).in_training
    assert OUTPUTS.in_training == OUTPUTS.in_training.in_training == OUTPUTS


def test_every_backend_asks_for_a_known_configuration():
    backends = [registry.get(name) for name in BACKENDS]
    lowerings = [backend for backend in backends if isinstance(backend, Lowering)]
    assert len(lowerings) > 3
    for backend in lowerings:
        for bits in (8, 16):
            settings = backend.default_config(bits)
            assert settings.position in ("outputs", "inputs") and settings.bias in (
                "float",
                "int32",
            )
            assert settings.scales in ("tensor", "apart", "needed")
            # A channel's average would be read by layers that add channels up.
            assert not (settings.scales == "apart" and settings.pooling_keeps_scale)
