"""INT8 quantization-aware training: what is rounded when, what moves when, and that conversion keeps what was trained."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import bright_and_dark
from torch import nn

from utils import environment, metrics
from utils.backends import registry, torch_ao
from utils.backends.torch_ao import FakeQuantize
from utils.measure import footprint
from utils.training import loop
from utils.training.checkpoints import Checkpoint
from utils.training.loop import Resume, Setup

RECIPE = dict(weights="per_channel_symmetric", activations="histogram", calibration_images=32, keep_fp32=())
TRAINING = dict(
    epochs=3, batch_size=8, keep="last", patience=0, backbone_lr=1e-2, head_lr=1e-2, warmup_epochs=0,
    weight_decay=0.0, label_smoothing=0.0, clip_norm=1.0, augment=None,
    bn_momentum=0.1, freeze_bn=1, freeze_observers=2, amp=False,
)  # fmt: skip
SETUP = Setup(head=set(), seed=0, device="cpu")


class Small(nn.Module):
    """Convolutions with BatchNorm, with and without ReLU, a residual sum, hardswish, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act, self.pool, self.fc = nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.pool(self.act(x + self.bn2(self.conv2(x)))), 1))


@pytest.fixture(scope="module", params=[8, 7], autouse=True)
def bits(request):
    """How many bits activations have: 8 where the processor has VNNI, 7 where it has not."""
    if request.param == 8 and not environment.has_vnni():
        pytest.skip("without VNNI, sums of 8-bit products saturate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "has_vnni", lambda: request.param == 8)
        yield request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return bright_and_dark(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def images(data):
    return data.train.calibration(24)


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    model = Small().train()
    with torch.no_grad():
        for _ in range(20):  # statistics as a trained network has them
            model(data.train.calibration(24))
    return model.eval()


@pytest.fixture(scope="module")
def prepared(model, images, bits):
    return registry.get("fbgemm").prepare(model, images, RECIPE)


@pytest.fixture(scope="module")
def trained(prepared, data, tmp_path_factory):
    network = copy.deepcopy(prepared)
    folder = tmp_path_factory.mktemp("trained")
    loop.fit(network, data, TRAINING, SETUP, Resume(folder / "x.resume", "x"))
    return Checkpoint(folder, network.eval(), "", {})


def fakes(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, FakeQuantize)}


def ranges(network, weights=False):
    modules = fakes(network).items()
    return [module.activation_post_process.max_val.clone() for name, module in modules if ("weight" in name) == weights]


def sqnr_db(a, b):
    value = metrics.sqnr_db(a, b)
    return math.inf if value is None else value


def answers(network, images):
    with torch.inference_mode():
        return network(images).numpy()


def test_training_starts_from_the_float_model_with_its_ranges(model, prepared, images):
    network = copy.deepcopy(prepared).eval()
    assert all(bool((limit > 0).all()) for limit in ranges(network))
    assert metrics.sqnr_db(answers(model, images), answers(network, images)) > 20


def test_activations_are_rounded_and_clipped_as_by_the_kernels(prepared, images, bits):
    """The scale leaves the kernels no more than `bits` bits for what was seen in training; they clip at 255 all the same."""
    rounding = copy.deepcopy(prepared).eval().get_submodule("activation_post_process_0")
    low, high = images.min().item(), images.max().item()
    assert rounding.scale.item() == pytest.approx((high - low) / (2**bits - 1), rel=0.1)
    x = torch.linspace(3 * low, 3 * high, 10_001)
    zero_point, scale = rounding.zero_point.item(), rounding.scale.item()
    expected = scale * (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point)
    assert torch.allclose(rounding(x), expected, atol=1e-6)


def test_ranges_move_in_training_and_never_in_validation(prepared, data):
    network = copy.deepcopy(prepared).eval()
    before = ranges(network) + ranges(network, weights=True)
    loop.predict(network, data.validation)
    network(100 * data.train.calibration(4))
    assert all(map(torch.equal, before, ranges(network) + ranges(network, weights=True)))
    network.train()
    network(100 * data.train.calibration(4))
    assert not any(map(torch.equal, before, ranges(network)))


def test_the_schedule_freezes_batchnorm_and_then_the_ranges(prepared, data):
    training = loop.Training(copy.deepcopy(prepared), data, TRAINING, SETUP)

    def state():
        statistics = [b.clone() for name, b in training.model.named_buffers() if "running" in name]
        return statistics, ranges(training.model)

    for epoch, (bn_moves, ranges_move) in enumerate([(True, True), (False, True), (False, False)]):
        (bn, limits), _ = state(), training.epoch()
        after = state()
        assert all(map(torch.equal, bn, after[0])) == (not bn_moves), epoch
        assert all(map(torch.equal, limits, after[1])) == (not ranges_move), epoch


def test_dropout_rests_where_the_recipe_says_so():
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(3))
    x = torch.ones(4, 3, 8, 8)
    for recipe, rests in (({}, False), ({"dropout": True}, False), ({"dropout": False}, True)):
        loop.freeze(network.train(), recipe, epoch=0)
        assert torch.equal(network[0](x), x) == rests
        assert network[1].training


def test_conversion_keeps_what_was_trained(trained, model, images, data):
    deployed = registry.get("fbgemm").convert(trained, model, images, RECIPE)
    counts = footprint.of_numbers(deployed.stored)
    assert counts["quantized_modules"] == counts["weight_modules"] == 3
    assert deployed.fake_quant is trained.model
    x = next(data.test.batches(12))[0]
    rounded, integers = answers(trained.model, x), answers(deployed.predict, x)
    assert sqnr_db(rounded, integers) > 25  # float sums and integer kernels round some values to different sides
    assert np.array_equal(rounded.argmax(1), integers.argmax(1))


def test_the_float_twin_is_the_trained_network_without_rounding(trained, model, data):
    network = copy.deepcopy(trained.model)
    for module in fakes(network).values():
        module.disable_fake_quant()
    x = next(data.test.batches(12))[0]
    twin = torch_ao.float_twin(trained.model, model)
    assert np.allclose(answers(twin, x), answers(network, x), rtol=1e-4, atol=1e-5)
    assert not np.allclose(answers(twin, x), answers(model, x), atol=1e-2)


def test_layers_kept_in_fp32_are_trained_and_kept(model, images, data, tmp_path):
    backend, recipe = registry.get("fbgemm"), RECIPE | dict(keep_fp32=("conv1", "bn1", "relu"))
    network = backend.prepare(model, images, recipe)
    loop.fit(network, data, TRAINING | dict(epochs=1), SETUP, Resume(tmp_path / "x.resume", "x"))
    deployed = backend.convert(Checkpoint(None, network.eval(), "", {}), model, images, recipe)
    assert deployed.facts["quantized"] == ["conv2", "fc"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.predict.modules())
    deployed.save(tmp_path / "artifact")
    noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(answers(deployed.predict, noise), answers(backend.load(tmp_path / "artifact", "cpu"), noise))
    x = next(data.test.batches(12))[0]
    assert sqnr_db(answers(network, x), answers(deployed.predict, x)) > 25
    for module in fakes(network).values():
        module.disable_fake_quant()
    assert np.allclose(answers(torch_ao.float_twin(network, model), x), answers(network, x), rtol=1e-4, atol=1e-5)


def test_engines_share_a_training_exactly_where_they_round_alike(monkeypatch):
    for vnni, shared in ((True, {"fbgemm", "x86", "onednn", "qnnpack"}), (False, {"fbgemm", "x86", "onednn"})):
        monkeypatch.setattr("utils.environment.has_vnni", lambda vnni=vnni: vnni)
        trainings = {name: registry.get(name).training(RECIPE) for name in torch_ao.ENGINES}
        assert {name for name in trainings if trainings[name] == trainings["fbgemm"]} == shared
        assert len({tag for tag, _ in trainings.values()}) == (1 if vnni else 2)  # else they would overwrite each other


@pytest.mark.parametrize("engine", ["qnnpack", "onednn"])
def test_one_training_serves_every_engine(trained, model, images, data, engine):
    backend = registry.get(engine)
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip("not in this build of torch")
    deployed = backend.convert(trained, model, images, RECIPE)
    x = next(data.test.batches(12))[0]
    assert sqnr_db(answers(trained.model, x), answers(deployed.predict, x)) > 25


def test_the_trained_weights_come_back_from_their_file(trained, prepared, images):
    again = copy.deepcopy(prepared)
    again.load_state_dict(trained.model.state_dict())
    assert np.array_equal(answers(again.eval(), images), answers(trained.model, images))


def test_conversion_changes_no_weight(trained, model, images):
    """torch's fused fake quantization would: conversion scales symmetric weights differently from it."""
    deployed = registry.get("fbgemm").convert(trained, model, images, RECIPE)
    for name in ("conv1", "conv2", "fc"):
        layer = trained.model.get_submodule(name)
        weight = layer.weight
        if hasattr(layer, "bn"):
            weight = weight * (layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)).view(-1, 1, 1, 1)
        rounded = layer.weight_fake_quant(weight.detach())
        packed = deployed.predict.get_submodule(name).weight()
        assert torch.allclose(packed.dequantize(), rounded, rtol=1e-5, atol=1e-8)
        assert packed.int_repr().int().abs().max() == 127
