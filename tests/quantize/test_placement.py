"""Where pairs stand on a network that has everything, and which of them share or divide their scales."""

import dataclasses
import json

import pytest
import torch
from helpers import Everything, SmallDepthwise, noise, small
from torch import fx, nn

from utils.catalog import BACKENDS
from utils.quantize import operators, placement, ptq
from utils.quantize.placement import INTEGERS, Inserted, Placement

OUTPUTS, INPUTS = Placement("outputs"), Placement("inputs")


def inserted(settings: Placement, keep_fp32: tuple[str, ...] = (), fold: bool = True) -> tuple[list[str], Inserted]:
    """What `Everything` calls one after the other with pairs inserted, and their description."""
    model = small(Everything)
    network = operators.folded(model) if fold else fx.symbolic_trace(model)
    pairs = placement.insert(network, settings, keep_fp32, nn.Identity)
    calls = [node.target if node.op == "call_module" else node.name for node in network.graph.nodes]
    return calls, pairs


# ---- places


def test_pairs_at_outputs_stand_behind_every_operator():
    calls, pairs = inserted(OUTPUTS)
    assert calls == [
        "x", "pair_x", "stem", "relu", "pair_stem", "shrink", "pair_stem",  # the same pair behind what moves its values
        "conv", "pair_conv", "add", "pair_add", "swish", "pair_swish", "depthwise", "pair_depthwise", "swish", "pair_swish_1",
        "squeeze", "pair_squeeze", "reduce", "relu", "pair_reduce", "excite", "pair_excite", "gate", "pair_gate",
        "mul", "pair_mul", "project", "pair_project", "squeeze", "pair_squeeze_1", "flatten", "pair_squeeze_1",
        "fc", "pair_fc", "swish", "pair_swish_2", "head", "pair_head", "output",
    ]  # fmt: skip
    assert pairs.reads == {
        "stem": "pair_x", "conv": "pair_stem", "depthwise": "pair_swish", "reduce": "pair_squeeze", "excite": "pair_reduce",
        "project": "pair_mul", "fc": "pair_squeeze_1", "head": "pair_swish_2",
    }  # fmt: skip
    assert list(pairs.source) == list(dict.fromkeys(call for call in calls if call.startswith("pair_")))
    sources = {"pair_x": "x", "pair_stem": "stem", "pair_add": "add", "pair_swish_1": "swish", "pair_mul": "mul"}
    assert {name: pairs.source[name] for name in sources} == sources


def test_pairs_at_inputs_stand_before_convolutions_and_linear_layers_only():
    calls, pairs = inserted(INPUTS)
    assert calls == [
        "x", "pair_x", "stem", "relu", "pair_stem", "shrink", "pair_stem",  # max pooling selects from rounded numbers
        "conv", "add", "swish", "pair_swish", "depthwise", "swish",
        "squeeze", "pair_squeeze", "reduce", "relu", "pair_reduce", "excite", "gate", "mul", "pair_mul", "project",
        "squeeze", "flatten", "pair_flatten", "fc", "swish", "pair_swish_2", "head", "output",
    ]  # fmt: skip
    assert pairs.reads == {
        "stem": "pair_x", "conv": "pair_stem", "depthwise": "pair_swish", "reduce": "pair_squeeze", "excite": "pair_reduce",
        "project": "pair_mul", "fc": "pair_flatten", "head": "pair_swish_2",
    }  # fmt: skip


class Block(nn.Module):
    """A residual block with a convolution beside it, as in ResNet-18, and one without."""

    def __init__(self):
        super().__init__()
        self.conv, self.beside, self.later, self.relu = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.conv(x) + self.beside(x))
        return self.relu(self.later(y) + y)


def test_additions_read_rounded_numbers_where_the_placement_says_so():
    network = fx.symbolic_trace(Block().eval())
    placement.insert(network, Placement("inputs", rounded_sums=True), (), nn.Identity)
    read = {node.name: [each.name for each in node.args] for node in network.graph.nodes if node.name.startswith("add")}
    assert read == {"add": ["pair_conv", "pair_beside"], "add_1": ["pair_later", "pair_add"]}
    network = fx.symbolic_trace(Block().eval())
    placement.insert(network, Placement("inputs"), (), nn.Identity)
    read = {node.name: [each.name for each in node.args] for node in network.graph.nodes if node.name.startswith("add")}
    assert read == {"add": ["conv", "beside"], "add_1": ["later", "relu"]}


class TwoReaders(nn.Module):
    """Two convolutions and a sum read the same tensor, as in the blocks of ResNet-18."""

    def __init__(self):
        super().__init__()
        self.relu, self.left, self.right = nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.relu(x)
        return self.left(x) + self.right(x) + x


@pytest.mark.parametrize(("settings", "raw"), [(INPUTS, True), (OUTPUTS, False)])
def test_layers_that_read_one_tensor_read_one_pair(settings, raw):
    network = fx.symbolic_trace(TwoReaders().eval())
    pairs = placement.insert(network, settings, (), nn.Identity)
    assert pairs.reads == {"left": "pair_relu", "right": "pair_relu"}
    last = next(node for node in network.graph.nodes if node.name == "add_1")
    assert last.args[1].target == ("relu" if raw else "pair_relu")  # a sum reads what the placement says


@pytest.mark.parametrize(("settings", "pair"), [(OUTPUTS, True), (dataclasses.replace(OUTPUTS, float_logits=True), False)])
def test_logits_are_rounded_unless_they_stay_float(settings, pair):
    calls, pairs = inserted(settings)
    assert calls[-3:] == (["head", "pair_head", "output"] if pair else ["pair_swish_2", "head", "output"])
    assert ("pair_head" in pairs.source) == pair and pairs.reads["head"] == "pair_swish_2"


EVERY = [
    Placement(pairs, scales=scales, float_logits=float_logits)
    for pairs in ("outputs", "inputs")
    for scales in ("tensor", "apart", "needed")
    for float_logits in (False, True)
]


@pytest.mark.parametrize("keep_fp32", [(), ("stem", "excite", "fc")])
def test_names_do_not_depend_on_folding(keep_fp32):
    for settings in EVERY:
        folded, as_it_is = (inserted(settings, keep_fp32, fold)[1] for fold in (True, False))
        assert folded == as_it_is


# ---- what stays in FP32


def test_what_stays_in_fp32_reads_and_gives_pairs_only_where_others_are_quantized():
    calls, pairs = inserted(OUTPUTS, ("reduce", "excite"))
    missing = {"pair_reduce"}  # between the two
    assert set(inserted(OUTPUTS)[1].source) - set(pairs.source) == missing
    assert "reduce" not in pairs.reads and "excite" not in pairs.reads
    assert calls[calls.index("squeeze") :][:6] == ["squeeze", "pair_squeeze", "reduce", "relu", "excite", "pair_excite"]
    _, at_inputs = inserted(INPUTS, ("reduce", "excite"))
    assert set(inserted(INPUTS)[1].source) - set(at_inputs.source) == {"pair_squeeze", "pair_reduce"}


def test_an_image_that_only_fp32_reads_is_not_rounded():
    for settings in (OUTPUTS, INPUTS):
        _, pairs = inserted(settings, ("stem",))
        assert "pair_x" not in pairs.source and "stem" not in pairs.reads


def test_a_network_that_stays_in_fp32_has_no_pairs():
    everything = tuple(name for name, _ in small(Everything).named_children())
    for settings in (OUTPUTS, INPUTS):
        _, pairs = inserted(settings, everything)
        # The sum and the product belong to no module.
        expected = {"pair_add", "pair_mul", "pair_conv", "pair_stem", "pair_swish_1", "pair_gate"}
        assert set(pairs.source) == (expected if settings is OUTPUTS else set()) and pairs.reads == {}


# ---- scales


def test_a_scale_for_each_channel_where_no_reader_adds_channels_up():
    apart = {"pair_conv", "pair_add", "pair_swish", "pair_depthwise", "pair_swish_1", "pair_excite", "pair_gate", "pair_project"}
    apart |= {"pair_fc"}  # hardswish reads it
    assert inserted(Placement("outputs", scales="apart"))[1].channelwise == apart
    assert inserted(Placement("inputs", scales="apart"))[1].channelwise == {"pair_swish"}


@pytest.mark.parametrize("pairs", ["outputs", "inputs"])
def test_a_scale_for_each_channel_only_where_depthwise_convolutions_read(pairs):
    assert inserted(Placement(pairs, scales="needed"))[1].channelwise == {"pair_swish"}
    assert inserted(Placement(pairs))[1].channelwise == set()


@pytest.mark.parametrize("pairs", ["outputs", "inputs"])
def test_even_inputs_of_depthwise_convolutions_have_one_scale(pairs):
    for even, expected in (set(), {"pair_swish"}), ({"depthwise"}, set()):
        network = operators.folded(small(Everything))
        network.meta["even"] = even
        assert placement.insert(network, Placement(pairs, scales="needed"), (), nn.Identity).channelwise == expected


def test_a_sum_beside_a_depthwise_convolution_leaves_it_its_scales():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.depthwise, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.last(x + self.depthwise(x))

    settings = Placement("inputs", scales="needed", rounded_sums=True)
    assert placement.insert(fx.symbolic_trace(Residual()), settings, (), nn.Identity).channelwise == {"pair_stem"}


class Flattened(nn.Module):
    """Elementwise operators, whose channels become pixels in between."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.gate, self.fc = nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Hardsigmoid(), nn.Linear(4 * 64, 2)

    def forward(self, x):
        return self.fc(self.gate(torch.flatten(self.act(self.conv(x)), 1)))


def test_flattened_channels_share_a_scale():
    pairs = placement.insert(operators.folded(Flattened()), Placement("outputs", scales="apart"), (), nn.Identity)
    assert pairs.channelwise == {"pair_conv"}  # not that of hardswish, whose reader sees one row


def test_an_average_has_the_scale_of_what_it_averages_and_a_gate_a_fixed_one():
    _, pairs = inserted(Placement("outputs", pooling_keeps_scale=True, unit_gates=True))
    assert pairs.same_as == {"pair_squeeze": "pair_swish_1", "pair_squeeze_1": "pair_project"}
    assert pairs.gates == {"pair_gate"}
    _, pairs = inserted(OUTPUTS)
    assert pairs.same_as == {} and pairs.gates == set()


# ---- settings


@pytest.mark.parametrize("settings", [*EVERY, Placement("outputs", torch.int16, torch.int16, "int32", True, 2**16 - 1, "apart")])
def test_a_placement_comes_back_from_its_description(settings):
    described = json.loads(json.dumps(settings.describe()))
    assert Placement.of(described) == settings
    assert described["activation"] == str(settings.activation).removeprefix("torch.")
    assert Placement.of(described | {"levels": 3}) != settings


def test_the_lowest_integer_of_a_weight_is_not_used():
    layer = nn.Linear(2, 2)
    assert (OUTPUTS.highest_weight(layer), Placement("outputs", weight=torch.int16).highest_weight(layer)) == (127, 32767)


def test_depthwise_weights_alone_have_seven_bits_where_only_their_products_are_narrow():
    placement = Placement("outputs", narrow_depthwise=True)
    assert placement.narrowed("activations") == placement.narrowed("weights") == placement
    layers = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Linear(4, 4)
    assert [placement.highest_weight(layer) for layer in layers] == [64, 127, 127, 127]
    network = ptq.quantize(small(SmallDepthwise), noise(8, 32), dict(activations="minmax"), placement)
    assert {name: layer.weight.abs().max().item() for name, layer in network.layers.items()} == {
        "stem.0": 127, "depthwise.0": 64, "pointwise": 127, "head": 127,
    }  # fmt: skip


def test_one_factor_of_narrow_products_has_seven_bits():
    narrow = Placement("outputs", narrow=True)
    assert OUTPUTS.narrowed("weights") == OUTPUTS.narrowed("activations") == OUTPUTS
    for factor, levels, highest in (("activations", 127, 127), ("weights", 255, 64)):
        placement = narrow.narrowed(factor)
        assert (placement.levels, placement.highest_weight(nn.Linear(2, 2))) == (levels, highest)
        assert 2 * levels * highest <= 2**15 - 1
    with pytest.raises(ValueError, match="bias"):
        narrow.narrowed("bias")
    for dtype, ends in INTEGERS.items():
        assert ends == (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def test_training_rounds_as_uint8_and_leaves_biases_alone():
    deployed = Placement("outputs", torch.int8, bias="int32", levels=127, scales="needed", float_logits=True)
    assert deployed.in_training == Placement("outputs", torch.uint8, levels=127, scales="needed")
    symmetric = Placement("inputs", torch.int8, symmetric=True)
    assert symmetric.in_training == symmetric  # its zero-points are 0
    assert symmetric.in_training != dataclasses.replace(symmetric, symmetric=False).in_training
    assert OUTPUTS.in_training == OUTPUTS.in_training.in_training == OUTPUTS


def test_every_placement_of_a_backend_is_a_known_one():
    from utils.backends import registry

    for name in BACKENDS:
        if hasattr(backend := registry.get(name), "placement"):
            settings = backend.placement(8)
            assert settings.pairs in ("outputs", "inputs") and settings.bias in ("float", "int32")
            assert settings.scales in ("tensor", "apart", "needed")
            # A channel's average would be read by layers that add channels up.
            assert not (settings.scales == "apart" and settings.pooling_keeps_scale)
