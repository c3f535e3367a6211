"""Insertion of Q/DQ pairs: their places, and pairs that share or divide their scales."""

import dataclasses

import pytest
import torch
from helpers import Everything, small
from torch import fx, nn

from utils.quantize import operators
from utils.quantize.insertion import Inserted, insert
from utils.quantize.qdq_config import QDQConfig

OUTPUTS, INPUTS = QDQConfig("outputs"), QDQConfig("inputs")


def inserted(
    settings: QDQConfig, keep_fp32: tuple[str, ...] = (), fold: bool = True
) -> tuple[list[str], Inserted]:
    """Insert pairs into `Everything`; return its calls in order, and what describes the pairs."""
    model = small(Everything)
    network = operators.folded(model) if fold else fx.symbolic_trace(model)
    qdqs = insert(network, settings, keep_fp32, nn.Identity)
    calls = [node.target if node.op == "call_module" else node.name for node in network.graph.nodes]
    return calls, qdqs


# ---- places


def test_pairs_at_outputs_follow_every_operator():
    calls, qdqs = inserted(OUTPUTS)
    assert calls == [
        "x", "qdq_x", "stem", "relu", "qdq_stem",
        "shrink", "qdq_stem",  # the same pair follows an operator that moves its values
        "conv", "qdq_conv", "add", "qdq_add", "swish", "qdq_swish",
        "depthwise", "qdq_depthwise", "swish", "qdq_swish_1",
        "squeeze", "qdq_squeeze", "reduce", "relu", "qdq_reduce",
        "excite", "qdq_excite", "gate", "qdq_gate", "mul", "qdq_mul",
        "project", "qdq_project", "squeeze", "qdq_squeeze_1", "flatten", "qdq_squeeze_1",
        "fc", "qdq_fc", "swish", "qdq_swish_2", "head", "qdq_head", "output",
    ]  # fmt: skip
    assert qdqs.reads == {
        "stem": "qdq_x", "conv": "qdq_stem", "depthwise": "qdq_swish", "reduce": "qdq_squeeze",
        "excite": "qdq_reduce", "project": "qdq_mul", "fc": "qdq_squeeze_1", "head": "qdq_swish_2",
    }  # fmt: skip
    pairs = [call for call in calls if call.startswith("qdq_")]
    assert list(qdqs.source) == list(dict.fromkeys(pairs))
    sources = {
        "qdq_x": "x", "qdq_stem": "stem", "qdq_add": "add", "qdq_swish_1": "swish",
        "qdq_mul": "mul",
    }  # fmt: skip
    assert {name: qdqs.source[name] for name in sources} == sources


def test_pairs_at_inputs_precede_convolutions_and_linear_layers_only():
    calls, qdqs = inserted(INPUTS)
    assert calls == [
        "x", "qdq_x", "stem", "relu", "qdq_stem",
        "shrink", "qdq_stem",  # max pooling selects from rounded numbers
        "conv", "add", "swish", "qdq_swish", "depthwise", "swish",
        "squeeze", "qdq_squeeze", "reduce", "relu", "qdq_reduce", "excite", "gate", "mul",
        "qdq_mul", "project", "squeeze", "flatten", "qdq_flatten",
        "fc", "swish", "qdq_swish_2", "head", "output",
    ]  # fmt: skip
    assert qdqs.reads == {
        "stem": "qdq_x", "conv": "qdq_stem", "depthwise": "qdq_swish", "reduce": "qdq_squeeze",
        "excite": "qdq_reduce", "project": "qdq_mul", "fc": "qdq_flatten", "head": "qdq_swish_2",
    }  # fmt: skip


class Block(nn.Module):
    """Residual blocks with and without a convolution in the shortcut, as in ResNet-18."""

    def __init__(self):
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.later, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.conv(x) + self.shortcut(x))
        return self.relu(self.later(y) + y)


@pytest.mark.parametrize(
    ("rounded", "expected"),
    [
        (True, {"add": ["qdq_conv", "qdq_shortcut"], "add_1": ["qdq_later", "qdq_add"]}),
        (False, {"add": ["conv", "shortcut"], "add_1": ["later", "relu"]}),
    ],
)
def test_additions_read_rounded_numbers_where_the_configuration_says_so(rounded, expected):
    network = fx.symbolic_trace(Block().eval())
    insert(network, QDQConfig("inputs", rounded_sums=rounded), (), nn.Identity)
    read = {}
    for node in network.graph.nodes:
        if node.name.startswith("add"):
            read[node.name] = [operand.name for operand in node.args]
    assert read == expected


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
    qdqs = insert(network, settings, (), nn.Identity)
    assert qdqs.reads == {"left": "qdq_relu", "right": "qdq_relu"}
    last = next(node for node in network.graph.nodes if node.name == "add_1")
    assert last.args[1].target == ("relu" if raw else "qdq_relu")


@pytest.mark.parametrize(
    ("settings", "rounded"),
    [(OUTPUTS, True), (dataclasses.replace(OUTPUTS, float_logits=True), False)],
)
def test_logits_are_rounded_unless_they_stay_float(settings, rounded):
    calls, qdqs = inserted(settings)
    assert calls[-3:] == (
        ["head", "qdq_head", "output"] if rounded else ["qdq_swish_2", "head", "output"]
    )
    assert ("qdq_head" in qdqs.source) == rounded and qdqs.reads["head"] == "qdq_swish_2"


EVERY = [
    QDQConfig(position, scales=scales, float_logits=float_logits)
    for position in ("outputs", "inputs")
    for scales in ("tensor", "apart", "needed")
    for float_logits in (False, True)
]


@pytest.mark.parametrize("keep_fp32", [(), ("stem", "excite", "fc")])
def test_names_do_not_depend_on_folding(keep_fp32):
    for settings in EVERY:
        folded, as_it_is = (inserted(settings, keep_fp32, fold)[1] for fold in (True, False))
        assert folded == as_it_is


# ---- layers in FP32


def test_layers_in_fp32_have_pairs_only_next_to_quantized_operators():
    calls, qdqs = inserted(OUTPUTS, ("reduce", "excite"))
    missing = {"qdq_reduce"}  # between the two
    assert set(inserted(OUTPUTS)[1].source) - set(qdqs.source) == missing
    assert "reduce" not in qdqs.reads and "excite" not in qdqs.reads
    expected = ["squeeze", "qdq_squeeze", "reduce", "relu", "excite", "qdq_excite"]
    assert calls[calls.index("squeeze") :][:6] == expected
    _, at_inputs = inserted(INPUTS, ("reduce", "excite"))
    assert set(inserted(INPUTS)[1].source) - set(at_inputs.source) == {"qdq_squeeze", "qdq_reduce"}


def test_an_image_that_only_fp32_reads_is_not_rounded():
    for settings in (OUTPUTS, INPUTS):
        _, qdqs = inserted(settings, ("stem",))
        assert "qdq_x" not in qdqs.source and "stem" not in qdqs.reads


def test_a_network_that_stays_in_fp32_has_no_pairs():
    everything = tuple(name for name, _ in small(Everything).named_children())
    for settings in (OUTPUTS, INPUTS):
        _, qdqs = inserted(settings, everything)
        # The sum and the product belong to no module.
        expected = {"qdq_add", "qdq_mul", "qdq_conv", "qdq_stem", "qdq_swish_1", "qdq_gate"}
        assert set(qdqs.source) == (expected if settings is OUTPUTS else set()) and qdqs.reads == {}


# ---- scales


def test_one_scale_per_channel_where_no_reader_sums_over_channels():
    apart = {
        "qdq_conv", "qdq_add", "qdq_swish", "qdq_depthwise", "qdq_swish_1", "qdq_excite",
        "qdq_gate", "qdq_project", "qdq_fc",
    }  # fmt: skip
    assert inserted(QDQConfig("outputs", scales="apart"))[1].channelwise == apart
    assert inserted(QDQConfig("inputs", scales="apart"))[1].channelwise == {"qdq_swish"}


@pytest.mark.parametrize("position", ["outputs", "inputs"])
def test_one_scale_per_channel_only_where_depthwise_convolutions_read(position):
    assert inserted(QDQConfig(position, scales="needed"))[1].channelwise == {"qdq_swish"}
    assert inserted(QDQConfig(position))[1].channelwise == set()


@pytest.mark.parametrize("position", ["outputs", "inputs"])
def test_equalized_inputs_of_depthwise_convolutions_have_one_scale(position):
    config = QDQConfig(position, scales="needed")
    for equalized, expected in (frozenset(), {"qdq_swish"}), (frozenset({"depthwise"}), set()):
        network = operators.folded(small(Everything))
        qdqs = insert(network, config, (), nn.Identity, equalized)
        assert qdqs.channelwise == expected


class DepthwiseResidual(nn.Module):
    """A depthwise convolution and a sum read the same tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.depthwise(x))


def test_a_sum_does_not_take_its_scales_from_a_depthwise_convolution():
    settings = QDQConfig("inputs", scales="needed", rounded_sums=True)
    qdqs = insert(fx.symbolic_trace(DepthwiseResidual()), settings, (), nn.Identity)
    assert qdqs.channelwise == {"qdq_stem"}


class Flattened(nn.Module):
    """Elementwise operators with a flattening between them."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.Hardswish()
        self.gate, self.fc = nn.Hardsigmoid(), nn.Linear(4 * 64, 2)

    def forward(self, x):
        return self.fc(self.gate(torch.flatten(self.act(self.conv(x)), 1)))


def test_flattened_channels_share_a_scale():
    qdqs = insert(
        operators.folded(Flattened()), QDQConfig("outputs", scales="apart"), (), nn.Identity
    )
    assert qdqs.channelwise == {"qdq_conv"}  # not qdq_act, which is read flattened


def test_an_average_has_the_scale_of_its_input_and_a_gate_a_fixed_one():
    _, qdqs = inserted(QDQConfig("outputs", pooling_keeps_scale=True, unit_gates=True))
    assert qdqs.same_as == {"qdq_squeeze": "qdq_swish_1", "qdq_squeeze_1": "qdq_project"}
    assert qdqs.gates == {"qdq_gate"}
    _, qdqs = inserted(OUTPUTS)
    assert qdqs.same_as == {} and qdqs.gates == set()
