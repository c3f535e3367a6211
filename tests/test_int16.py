"""Simulated INT16: bit for bit what numpy's integers say, at most 65,536 values, and ranges by every method."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from utils import backends, calibrate, metrics
from utils.backends import simulated
from utils.backends.simulated import HIGH, LOW, Fixed
from utils.checkpoints import Checkpoint

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
    return backends.get("simulated").quantize(model, images, RECIPE)


def sqnr_db(a, b):
    found = metrics.sqnr_db(a, b)
    return math.inf if found is None else found


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


def test_channels_can_have_scales_of_their_own():
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
    integers, scale = simulated.quantize_weight(weight)
    assert integers.dtype == torch.int16
    for own, row, unit in zip(integers.numpy(), weight.numpy(), scale.numpy(), strict=True):
        expected = np.float32(np.abs(row).max()) / np.float32(HIGH) if row.any() else np.float32(1)
        assert unit == expected
        assert np.array_equal(own, np.rint(row / unit).astype(np.int16))
        assert np.abs(own).max() == (HIGH if row.any() else 0)


def test_biases_are_32_bits_at_the_accumulators_scale_or_one_that_holds_them():
    bias = torch.tensor([0.5, -3.0, 100.0, 0.0])
    input_scale, weight_scale = torch.tensor(2.0**-12), torch.tensor([2.0**-13, 2.0**-14, 2.0**-15, 2.0**-15])
    integers, scale = simulated.quantize_bias(bias, input_scale, weight_scale)
    assert integers.dtype == torch.int32
    assert integers.tolist() == [2**24, -3 * 2**26, 2**31 - 1, 0]
    assert scale.tolist() == [2.0**-25, 2.0**-26, 100 / (2**31 - 1), 2.0**-27]


def test_the_file_holds_integers(deployed, tmp_path):
    content = content_of(deployed, tmp_path)
    assert {own.dtype for own in content["weight"].values()} == {torch.int16}
    assert {own.dtype for own in content["bias"].values()} == {torch.int32}
    assert set(content["weight"]) == {"conv1", "conv2", "excite", "fc"} == set(content["bias"])  # BatchNorm became biases


def test_the_network_of_the_file_is_the_one_that_was_saved(model, deployed, images, tmp_path):
    again = simulated.assemble(model, content_of(deployed, tmp_path))
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
        assert any(np.abs(own - np.rint(own)).max() < 1e-2 and np.abs(own).max() <= -LOW for own in integers), name
    assert len(logits.unique()) <= 65_536


def test_16_bits_lose_next_to_nothing(model, deployed, images):
    with torch.inference_mode():
        assert metrics.sqnr_db(model(images).numpy(), deployed.predict(images).numpy()) > 70


def test_the_float_model_is_left_alone(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backends.get("simulated").quantize(model, images, RECIPE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def counts_of(values, maximum):
    return np.histogram(values, calibrate.BINS, (0, maximum))[0].astype(float)


@pytest.mark.parametrize("method", calibrate.LIMITS)
def test_16_bits_hardly_clip_by_any_method(method):
    values = np.abs(np.random.default_rng(0).standard_normal(200_000))
    limit = calibrate.LIMITS[method](counts_of(values, values.max()), values.max(), 16)
    assert 0.85 * values.max() <= limit <= values.max()


def test_mse_finds_the_limit_that_really_has_the_least_error_at_4_bits():
    values = np.abs(np.random.default_rng(0).laplace(size=100_000))
    found = calibrate.mse(counts_of(values, values.max()), values.max(), 4)

    def error(limit):
        step = limit / 7
        return np.square(values - np.clip(np.rint(values / step), 0, 7) * step).mean()

    best = min(error(limit) for limit in np.linspace(0.05, 1, 200) * values.max())
    assert error(found) < 1.03 * best
    assert error(found) < 0.5 * error(values.max())


def test_percentile_keeps_its_share():
    values = np.arange(1_000_000) / 1_000_000
    counts = counts_of(values, 1.0)
    counts[-1] += 0  # uniform: the limit is the percentile itself, to a bin
    assert calibrate.percentile(counts, 1.0, 8) == pytest.approx(calibrate.PERCENTILE / 100, abs=1 / calibrate.BINS)


def test_entropy_clips_a_lone_outlier_at_8_bits_and_not_at_16():
    values = np.concatenate([np.abs(np.random.default_rng(0).standard_normal(200_000)), [100.0]])
    counts = counts_of(values, 100.0)
    assert calibrate.entropy(counts, 100.0, 8) < 20
    assert calibrate.minmax(counts, 100.0, 8) == 100.0


def test_magnitudes_are_counted_over_all_batches():
    watched = calibrate.Magnitudes()
    images = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate.magnitudes(nn.Sequential(watched), images, "mse")
    assert watched.maximum.tolist() == [images.abs().max().item()]
    expected = np.histogram(images.abs().numpy(), calibrate.BINS, (0, watched.maximum.item()))[0]
    assert watched.counts.sum() == images.numel()
    assert np.abs(watched.counts[0].numpy() - expected).sum() <= 8  # values on an edge


def test_magnitudes_are_counted_for_each_channel():
    watched = calibrate.Magnitudes()
    watched.channelwise = True
    images = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 1e-6]).view(1, 3, 1, 1)
    calibrate.magnitudes(nn.Sequential(watched), images, "mse")
    for channel in range(3):
        own = images[:, channel].abs()
        assert watched.maximum[channel] == own.max()
        expected = np.histogram(own.numpy(), calibrate.BINS, (0, own.max().item()))[0]
        assert np.abs(watched.counts[channel].numpy() - expected).sum() <= 8
    limit = watched.limit("minmax", 16)
    assert limit.shape == (1, 3, 1, 1)
    largest = watched.maximum[1].item()
    expected = [watched.maximum[0].item(), largest, largest * calibrate.SILENT]  # nearly silent: it may wake up later
    assert limit.flatten().tolist() == pytest.approx(expected)


def test_a_tensor_of_zeros_has_a_range():
    watched = calibrate.Magnitudes()
    calibrate.magnitudes(nn.Sequential(watched), torch.zeros(4, 3, 8, 8), "mse")
    assert watched.limit("mse", 16) == 1.0


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
        network = backends.get("simulated").quantize(model, images, RECIPE).predict
        with torch.inference_mode():
            return metrics.sqnr_db(model(images).numpy(), network(images).numpy())

    assert sqnr() > 65
    monkeypatch.setattr(simulated, "channelwise", lambda graph, kind: set())
    assert sqnr() < 45  # one scale for the tensor


def test_channels_keep_apart_only_where_nothing_adds_them_up(images):
    model = Outlier().eval()
    graph = simulated.folded(model)
    simulated.insert(graph, Fixed)
    assert simulated.channelwise(graph, Fixed) == {"after_stem", "after_act", "after_pointwise"}


# ---- training


def test_training_rounds_as_the_deployed_network_does(model, images):
    prepared = backends.get("simulated").prepare(model, images, RECIPE).eval()
    deployed = backends.get("simulated").quantize(model, images, RECIPE).predict
    with torch.inference_mode():
        a, b = prepared(images).numpy(), deployed(images).numpy()
        assert sqnr_db(model(images).numpy(), a) > 60
    assert sqnr_db(a, b) > 60


def test_folding_batchnorm_leaves_the_integers_of_the_weights_alone(model):
    graph = simulated.folded(model)
    for name in ("conv1", "conv2"):
        integers, _ = simulated.quantize_weight(model.get_submodule(name).weight)
        folded, _ = simulated.quantize_weight(graph.get_submodule(name).weight)
        assert (integers.int() - folded.int()).abs().max() <= 1  # a product may round to the other side of a half


def test_training_moves_the_weights_under_the_rounding_and_converts_them(model, images, tmp_path):
    backend, recipe = backends.get("simulated"), RECIPE | dict(headroom=8.0)  # training moves the ranges, too
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
