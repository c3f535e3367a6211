"""INT16 arithmetic: bit for bit what NumPy's integers say, at most 65,536 values, and nothing stays unrounded."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils import metrics
from utils.backends import registry
from utils.catalog import MODELS
from utils.errors import UserError
from utils.quantize import fixed_point, layers
from utils.quantize.fixed_point import HIGH, LOW, Fixed
from utils.training import architectures
from utils.training.checkpoints import Checkpoint

RECIPE = dict(activations="minmax", headroom=1.0)


class Small(nn.Module):
    """All that the study's networks have: BatchNorm, a residual sum, squeeze and excitation, pooling, dropout."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.gate = nn.AdaptiveAvgPool2d(1), nn.Hardsigmoid()
        self.excite = nn.Conv2d(8, 8, 1)
        self.act = nn.Hardswish(inplace=True)
        self.dropout, self.fc = nn.Dropout(), nn.Linear(8, 2)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(x))
        out += x
        out = self.act(out)
        out = self.gate(self.excite(self.squeeze(out))) * out
        return self.fc(self.dropout(torch.flatten(self.squeeze(out), 1)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Small()
    model.architecture = "small"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(64, 3, 33, 33, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def deployed(model, images):
    return registry.get("simulated").quantize(model, images, RECIPE)


def sqnr_db(a, b):
    value = metrics.sqnr_db(a, b)
    return math.inf if value is None else value


def content_of(deployed, tmp_path):
    deployed.save(tmp_path / "artifact.pt")
    return torch.load(tmp_path / "artifact.pt", weights_only=True)


def fixed(scale):
    module = Fixed()
    module.scale = torch.as_tensor(scale, dtype=torch.float32)
    return module


def test_activations_are_numpys_integers_times_the_scale():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 3
    scale = np.float32(2.5 / HIGH)
    integers = np.clip(np.rint(x.numpy() / scale), LOW, HIGH).astype(np.int16)
    assert np.array_equal(fixed(scale)(x).numpy(), integers.astype(np.float32) * scale)
    assert {integers.min(), integers.max()} == {LOW, HIGH}  # both ends are reached, and held


def test_channels_can_have_a_scale_each():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    scales = np.array([1e-5, 3e-4, 2e-2], np.float32).reshape(1, 3, 1, 1)
    integers = np.clip(np.rint(x.numpy() / scales), LOW, HIGH).astype(np.int16)
    assert np.array_equal(fixed(torch.from_numpy(scales))(x).numpy(), integers.astype(np.float32) * scales)


def test_activations_take_at_most_65536_values():
    x = torch.linspace(-5, 5, 3_000_001)
    assert len(fixed(4 / HIGH)(x).unique()) == 65_536


def test_gradients_pass_the_rounding_and_stop_where_values_are_clipped():
    x = torch.tensor([-2.0, -0.3, 0.30001, 2.0], requires_grad=True)
    rounded = fixed(1 / HIGH)(x)
    rounded.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    with torch.no_grad():
        assert torch.allclose(rounded, fixed(1 / HIGH)(x), rtol=0, atol=1e-7)


def test_weights_are_numpys_integers_for_each_channel():
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 5).view(-1, 1, 1, 1)
    weight[2] = 0
    integers, scale = fixed_point.quantize_weight(weight)
    assert integers.dtype == torch.int16
    for numbers, row, unit in zip(integers.numpy(), weight.numpy(), scale.numpy(), strict=True):
        expected = np.float32(np.abs(row).max()) / np.float32(HIGH) if row.any() else np.float32(1)
        assert unit == expected
        assert np.array_equal(numbers, np.rint(row / unit).astype(np.int16))
        assert np.abs(numbers).max() == (HIGH if row.any() else 0)


def test_biases_are_32_bits_at_the_accumulators_scale_or_one_that_holds_them():
    bias = torch.tensor([0.5, -3.0, 100.0, 0.0])
    input_scale, weight_scale = torch.tensor(2.0**-12), torch.tensor([2.0**-13, 2.0**-14, 2.0**-15, 2.0**-15])
    integers, scale = fixed_point.quantize_bias(bias, input_scale, weight_scale)
    assert integers.dtype == torch.int32
    assert integers.tolist() == [2**24, -3 * 2**26, 2**31 - 1, 0]
    assert scale.tolist() == [2.0**-25, 2.0**-26, 100 / (2**31 - 1), 2.0**-27]


def test_the_file_holds_integers(deployed, tmp_path):
    content = content_of(deployed, tmp_path)
    assert {weight.dtype for weight in content["weight"].values()} == {torch.int16}
    assert {bias.dtype for bias in content["bias"].values()} == {torch.int32}
    assert set(content["weight"]) == {"conv1", "conv2", "excite", "fc"} == set(content["bias"])  # BatchNorm became biases


def test_the_network_of_the_file_is_the_one_that_was_saved(model, deployed, images, tmp_path):
    again = fixed_point.assemble(model, content_of(deployed, tmp_path))
    with torch.inference_mode():
        assert torch.equal(again(images), deployed.predict(images))


def test_every_layer_reads_16_bit_integers(deployed, images):
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _m, inputs, _o, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in deployed.predict.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.inference_mode():
        logits = deployed.predict(images)
    for hook in hooks:
        hook.remove()
    scales = [module.scale.double().numpy() for module in deployed.predict.modules() if isinstance(module, Fixed)]
    assert set(seen) == {"conv1", "conv2", "excite", "fc"}
    for name, x in seen.items():
        integers = [x.double().numpy() / scale for scale in scales if scale.ndim == 0]  # none of these reads channels apart
        assert any(np.abs(n - np.rint(n)).max() < 1e-2 and np.abs(n).max() <= -LOW for n in integers), name
    assert len(logits.unique()) <= 65_536


def test_16_bits_lose_next_to_nothing(model, deployed, images):
    with torch.inference_mode():
        assert metrics.sqnr_db(model(images).numpy(), deployed.predict(images).numpy()) > 70


def test_the_float_model_is_left_alone(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    registry.get("simulated").quantize(model, images, RECIPE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- operators


class With(nn.Module):
    """A network with `operator` between its two layers."""

    architecture = "small"

    def __init__(self, operator):
        super().__init__()
        self.conv, self.operator, self.gain = nn.Conv2d(3, 4, 3), operator, nn.Parameter(torch.ones(1))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        x = self.operator(x) if isinstance(self.operator, nn.Module) else self.operator(self, x)
        return self.fc(torch.flatten(self.pool(x), 1))


UNKNOWN = {
    "SiLU": nn.SiLU(),
    "Sigmoid": nn.Sigmoid(),
    "AvgPool2d": nn.AvgPool2d(2),
    "ReLU6": nn.ReLU6(),
    "silu": lambda _, x: F.silu(x),
    "sigmoid": lambda _, x: x.sigmoid(),
    "mean": lambda _, x: x.mean((2, 3), keepdim=True),
    "sub": lambda _, x: x - 1,
    "gain": lambda net, x: x * net.gain,  # it would be multiplied with as it is, in FP32
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("training", [False, True])
def test_an_operator_that_would_stay_unrounded_is_an_error_that_names_it(images, name, training):
    backend = registry.get("simulated")
    with pytest.raises(UserError, match=rf"INT16 does not know the operator {name} \(.*would stay unrounded"):
        (backend.prepare if training else backend.quantize)(With(UNKNOWN[name]).eval(), images, RECIPE)


KNOWN = [nn.Hardswish(), nn.Hardsigmoid(), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Identity(), lambda _, x: x + x]


@pytest.mark.parametrize("operator", KNOWN)
def test_an_operator_that_is_known_is_quantized(images, operator):
    model = With(operator).eval()
    deployed = registry.get("simulated").quantize(model, images, RECIPE)
    with torch.inference_mode():
        assert metrics.sqnr_db(model(images).numpy(), deployed.predict(images).numpy()) > 60


# Of each network the input, then everything that computes, with the ReLU behind it where there is one. AlexNet: 5 + 3 layers
# and a mean. ResNet-18: 20 + 1 layers, 8 sums, a mean. MobileNetV3: 52 + 2 layers, 19 hardswish, 9 hardsigmoid, 9 products,
# 6 sums, 10 means.
ROUNDED = {"alexnet": 1 + 9, "resnet18": 1 + 30, "mobilenetv3": 1 + 107}


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_of_the_study_have_known_operators_only(name):
    with torch.device("meta"):  # the structure is all that counts: no time is lost on drawing weights
        model = architectures.build(name)
    graph = fixed_point.folded(model.to_empty(device="cpu"))
    reads = fixed_point.insert(graph, Fixed)
    assert set(reads) == set(layers.weighted(model))
    assert sum(isinstance(module, Fixed) for module in graph.modules()) == ROUNDED[name]


# ---- activations with a scale for each channel


class Outlier(nn.Module):
    """A stem of which one channel is 10,000 times larger than the others, evened out by the depthwise convolution after it."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, bias=False), nn.Hardswish()
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)
        with torch.no_grad():
            self.stem.weight[0] *= 1e4
            self.depthwise.weight[0] /= 1e4

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.pointwise(self.depthwise(self.act(self.stem(x))))), 1))


def test_an_outlier_channel_takes_nothing_from_the_others(images, monkeypatch):
    torch.manual_seed(0)
    model = Outlier().eval()
    model.architecture = "outlier"

    def sqnr():
        network = registry.get("simulated").quantize(model, images, RECIPE).predict
        with torch.inference_mode():
            return metrics.sqnr_db(model(images).numpy(), network(images).numpy())

    assert sqnr() > 65
    monkeypatch.setattr(fixed_point, "channelwise", lambda graph, kind: set())
    assert sqnr() < 45  # one scale for the tensor


def test_channels_keep_apart_only_where_nothing_adds_them_up(images):
    model = Outlier().eval()
    graph = fixed_point.folded(model)
    fixed_point.insert(graph, Fixed)
    assert fixed_point.channelwise(graph, Fixed) == {"after_stem", "after_act", "after_pointwise"}


# ---- training


def test_training_rounds_as_the_deployed_network_does(model, images):
    prepared = registry.get("simulated").prepare(model, images, RECIPE).eval()
    deployed = registry.get("simulated").quantize(model, images, RECIPE).predict
    with torch.inference_mode():
        a, b = prepared(images).numpy(), deployed(images).numpy()
        assert sqnr_db(model(images).numpy(), a) > 60
    assert sqnr_db(a, b) > 60


def test_folding_batchnorm_leaves_the_integers_of_the_weights_alone(model):
    graph = fixed_point.folded(model)
    for name in ("conv1", "conv2"):
        integers, _ = fixed_point.quantize_weight(model.get_submodule(name).weight)
        folded, _ = fixed_point.quantize_weight(graph.get_submodule(name).weight)
        assert (integers.int() - folded.int()).abs().max() <= 1  # a product may round to the other side of a half


def test_training_moves_the_weights_under_the_rounding_and_converts_them(model, images, tmp_path):
    backend, recipe = registry.get("simulated"), RECIPE | dict(headroom=8.0)  # training moves the ranges, too
    prepared = backend.prepare(model, images, recipe)
    assert [name for name, _ in prepared.named_parameters()] == [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    y = torch.arange(len(images)) % 2
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(prepared(images), y).backward()
        optimizer.step()
    prepared.eval()
    converted = backend.convert(Checkpoint(tmp_path, prepared, "", {}), model, images, recipe)
    with torch.inference_mode():
        trained, before = prepared(images).numpy(), model(images).numpy()
        assert metrics.sqnr_db(trained, converted.predict(images).numpy()) > 55
        assert metrics.sqnr_db(trained, before) < 30  # it did learn something
    assert converted.fake_quant is prepared
