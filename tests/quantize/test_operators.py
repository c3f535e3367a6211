"""Operators that quantization knows, errors for all others, folding and the graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import Everything, noise, small
from torch import fx, nn

from utils import architectures, metrics
from utils.catalog import MODELS
from utils.errors import UserError
from utils.quantize import insertion, operators, ptq, start_qat
from utils.quantize.exact import execute
from utils.quantize.layers import weighted
from utils.quantize.operators import Graph, Kind
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

INT16 = QDQConfig(
    "outputs", torch.int16, torch.int16, bias="int32", symmetric=True, steps=2**16 - 1
)
RECIPE = Int8(ranges="minmax", calibration_images=8)


class With(nn.Module):
    """A network with `operator` between its two layers."""

    def __init__(self, operator):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.operator, self.gain = (
            nn.Conv2d(3, 4, 3),
            operator,
            nn.Parameter(torch.ones(1)),
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        x = self.operator(x) if isinstance(self.operator, nn.Module) else self.operator(self, x)
        return self.fc(torch.flatten(self.pool(x), 1))


UNKNOWN = {
    "SiLU": nn.SiLU(),
    "Sigmoid": nn.Sigmoid(),
    "AvgPool2d": nn.AvgPool2d(2),
    "ELU": nn.ELU(),
    "silu": lambda _, x: F.silu(x),
    "sigmoid": lambda _, x: x.sigmoid(),
    "mean": lambda _, x: x.mean((2, 3), keepdim=True),
    "sub": lambda _, x: x - 1,
    "gain": lambda net, x: x * net.gain,  # a parameter that would stay in FP32
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("method", [ptq, start_qat])
def test_an_operator_that_would_stay_unrounded_is_an_error_that_names_it(name, method):
    with pytest.raises(
        UserError, match=rf"quantization does not know the operator {name} \(.*would stay unrounded"
    ):
        method(With(UNKNOWN[name]).eval(), noise(2, 12), RECIPE, INT16)


@pytest.mark.parametrize(
    ("padding", "named"),
    [(dict(padding=1, padding_mode="reflect"), "reflect"), (dict(padding="same"), "same")],
)
def test_padding_by_anything_but_a_number_of_zeros_is_an_error(padding, named):
    with pytest.raises(UserError, match=f"numbers of zeros only, not '{named}'"):
        ptq(With(nn.Conv2d(4, 4, 3, **padding)).eval(), noise(2, 12), RECIPE, INT16)


KNOWN = {
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "max pooling": nn.MaxPool2d(2),
    "max pooling, then relu": nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
    "mean": nn.AdaptiveAvgPool2d(2),
    "mean by a function": lambda _, x: F.adaptive_avg_pool2d(x, 2),
    "mean, then relu": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.ReLU()),
    "norm": nn.BatchNorm2d(4),
    "norm after relu": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),  # it cannot be folded
    "identity": nn.Identity(),
    "dropout, then relu": nn.Sequential(nn.Dropout(), nn.ReLU()),
    "sum": lambda _, x: x + x,
    "sum times 3": lambda _, x: torch.add(x, x, alpha=2),
    "product": lambda _, x: x * x,
    "number": lambda _, x: 0.5 * x,
    "view": lambda net, x: net.pool(x).view(x.size(0), -1, 1, 1),
    "reshape": lambda net, x: net.pool(x).reshape(x.shape[0], 4, 1, 1),
    "contiguous": lambda _, x: x.contiguous(),
}


@pytest.mark.parametrize("name", KNOWN)
@torch.inference_mode()
def test_an_operator_that_is_known_is_quantized(name):
    model, images = With(KNOWN[name]).eval(), noise(4, 12)
    expected = model(images).numpy()
    quantized = execute(ptq(model, images, RECIPE, INT16), images)
    assert metrics.sqnr_db(expected, quantized.numpy()) > 60
    trainable = start_qat(model, images, RECIPE, INT16).eval()
    assert metrics.sqnr_db(expected, trainable(images).numpy()) > 60


def test_a_layer_cannot_serve_tensors_of_different_scales():
    model = With(lambda net, x: net.shared(torch.add(net.shared(x), x)))
    model.shared = nn.Conv2d(4, 4, 1)
    with pytest.raises(UserError, match=r"^shared reads tensors of different scales.*keep_fp32"):
        ptq(model.eval(), noise(2, 12), RECIPE, INT16)
    kept = ptq(model, noise(2, 12), RECIPE.replace(keep_fp32=("shared",)), INT16)
    assert list(kept.layers) == ["conv", "fc"]


# Pairs at outputs: after the input and after every computing operator, together with the ReLU that
# follows it. AlexNet: 5 + 3 layers and a mean. ResNet-18: 20 + 1 layers, 8 sums, a mean.
# MobileNetV3: 52 + 2 layers, 19 hardswish, 9 hardsigmoid, 9 products, 6 sums, 10 means. Pairs at
# inputs: one per layer, except that three blocks of ResNet-18 have two convolutions that read the
# same tensor.
PAIRS = {"alexnet": (1 + 9, 8), "resnet18": (1 + 30, 21 - 3), "mobilenetv3": (1 + 107, 54)}


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_of_the_study_have_known_operators_only(name):
    with torch.device("meta"):  # only the structure matters, so no weights are drawn
        model = architectures.build(name)
    network = operators.folded(model.to_empty(device="cpu"))
    for position, count in zip(("outputs", "inputs"), PAIRS[name], strict=True):
        graph = copy.deepcopy(network)
        inserted = insertion.insert(graph, QDQConfig(position), (), nn.Identity)
        assert set(inserted.reads) == set(weighted(model))
        assert len(inserted.source) == count
        pairs = {name for name, _ in graph.named_modules() if name.startswith("qdq_")}
        assert pairs == set(inserted.source)


# ---- folding


@torch.inference_mode()
def test_folding_leaves_the_answers_and_the_model_alone():
    model, images = small(Everything).train(), noise(4, 33)
    state = copy.deepcopy(model.state_dict())
    network = operators.folded(model)
    assert model.training and model.dropout.training and not network.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(network(images), model.eval()(images))


def test_folding_removes_batchnorm_dropout_and_identities():
    model = small(Everything)
    network = operators.folded(model)
    assert not any(
        isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.Identity)
        for module in network.modules()
    )
    assert list(weighted(network)) == list(weighted(model))
    gain = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)
    assert torch.allclose(network.conv.weight, model.conv.weight * gain.view(-1, 1, 1, 1))
    assert torch.allclose(
        network.conv.bias, model.norm.bias - model.norm.running_mean * gain, atol=1e-6
    )


# ---- the graph


@pytest.fixture(scope="module", params=["folded", "as it is"])
def graph(request):
    model = small(Everything)
    return Graph(operators.folded(model) if request.param == "folded" else fx.symbolic_trace(model))


def node(graph, name):
    return next(node for node in graph.nodes if node.name == name)


def test_every_operator_has_a_kind(graph):
    kinds = {node.name: kind for node, kind in graph.kinds.items()}
    layers = {"stem", "conv", "depthwise", "reduce", "excite", "project", "fc", "head"}
    assert {name for name, kind in kinds.items() if kind is Kind.LAYER} == layers
    averaging = {name for name, kind in kinds.items() if kind is Kind.AVERAGING}
    assert averaging == {"squeeze", "squeeze_1"}
    moving = {name for name, kind in kinds.items() if kind is Kind.MOVING}
    assert moving - {"dropout"} == {"shrink", "flatten"}
    computing = {name for name, kind in kinds.items() if kind is Kind.COMPUTING}
    norms = {"stem_norm", "norm", "depth_norm"}
    activations = {"relu", "relu_1", "swish", "swish_1", "swish_2", "gate"}
    assert computing - norms == {*activations, "add", "mul"}
    assert kinds["x"] is Kind.INPUT and kinds["output"] is Kind.OUTPUT


def test_sequences_are_computed_together_from_their_first_operator(graph):
    assert graph.first(node(graph, "relu")).name == "stem"
    assert graph.first(node(graph, "relu_1")).name == "reduce"
    assert graph.first(node(graph, "swish")).name == "swish"  # hardswish is computed apart
    last = node(graph, "add").args[0]  # the convolution, or its BatchNorm where there is one
    assert graph.first(last).name == "conv" and graph.followed(last) is None
    assert graph.followed(node(graph, "reduce")).name == "relu_1"
    assert graph.followed(node(graph, "x")) is None


def test_the_readers_of_a_tensor_include_the_readers_of_its_moved_numbers(graph):
    readers = {"relu": ["conv", "add"], "squeeze_1": ["fc"], "swish_2": ["head"], "head": []}
    for name, expected in readers.items():
        assert [reader.name for reader in graph.readers(node(graph, name).users)] == expected
    assert graph.mixes_when_moved(node(graph, "squeeze_1"))
    assert not graph.mixes_when_moved(node(graph, "relu"))


def test_channels_are_kept_apart_by_depthwise_and_elementwise_operators(graph):
    apart = {
        node.name
        for node in graph.nodes
        if graph.computes(node) and graph.keeps_channels_apart(node)
    }
    assert apart >= {"depthwise", "swish", "gate", "add", "mul", "squeeze", "relu"}
    assert not apart & {"stem", "conv", "reduce", "excite", "project", "fc", "head"}
    assert [node.name for node in graph.nodes if graph.depthwise(node)] == ["depthwise"]


def test_a_name_means_the_module_and_what_is_in_it():
    model = nn.Sequential()
    for name in ("part", "part1"):
        model.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 1)))
    graph = Graph(fx.symbolic_trace(model))
    assert [node.name for node in graph.nodes if graph.inside(node, ("part",))] == ["part_0"]
    assert not any(graph.inside(node, ()) for node in graph.nodes)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x + self.conv(x)


def test_functions_that_a_module_calls_belong_to_it():
    graph = Graph(operators.folded(nn.Sequential(Residual(), Residual())))
    assert [node.name for node in graph.nodes if graph.inside(node, ("1",))] == ["_1_conv", "add_1"]
