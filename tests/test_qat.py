"""INT8 quantization-aware training: what is rounded when, what moves when, and that conversion keeps what was trained."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import bright_and_dark
from torch import nn

from utils import backends, metrics, train
from utils.backends import torch_ao
from utils.backends.torch_ao import FakeQuantize
from utils.checkpoints import Checkpoint

RECIPE = dict(weights="per_channel_symmetric", activations="histogram", calibration_images=32, keep_fp32=())
TRAINING = dict(
    epochs=3, batch_size=8, keep="last", patience=0, backbone_lr=1e-2, head_lr=1e-2, schedule="cosine", warmup_epochs=0,
    weight_decay=0.0, label_smoothing=0.0, clip_norm=1.0, augment=None,
    bn_momentum=0.1, freeze_bn=1, freeze_observers=2, amp=False,
)  # fmt: skip


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
def prepared(model, images):
    return backends.get("fbgemm").prepare(model, images, RECIPE)


@pytest.fixture(scope="module")
def trained(prepared, data, tmp_path_factory):
    network = copy.deepcopy(prepared)
    folder = tmp_path_factory.mktemp("trained")
    train.fit(network, data, TRAINING, head=set(), seed=0, device="cpu", resume=folder / "x.resume", fingerprint="x")
    return Checkpoint(folder, network.eval(), "", {})


def fakes(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, FakeQuantize)}


def ranges(network, weights=False):
    own = fakes(network).items()
    return [module.activation_post_process.max_val.clone() for name, module in own if ("weight" in name) == weights]


def sqnr_db(a, b):
    found = metrics.sqnr_db(a, b)
    return math.inf if found is None else found


def answers(network, images):
    with torch.inference_mode():
        return network(images).numpy()


def test_training_starts_from_the_float_model_with_its_ranges(model, prepared, images):
    network = copy.deepcopy(prepared).eval()
    assert all(bool((limit > 0).all()) for limit in ranges(network))
    assert metrics.sqnr_db(answers(model, images), answers(network, images)) > 20


def test_ranges_move_in_training_and_never_in_validation(prepared, data):
    network = copy.deepcopy(prepared).eval()
    before = ranges(network) + ranges(network, weights=True)
    train.predict(network, data.validation)
    network(100 * data.train.calibration(4))
    assert all(map(torch.equal, before, ranges(network) + ranges(network, weights=True)))
    network.train()
    network(100 * data.train.calibration(4))
    assert not any(map(torch.equal, before, ranges(network)))


def test_the_schedule_freezes_batchnorm_and_then_the_ranges(prepared, data):
    training = train.Training(copy.deepcopy(prepared), data, TRAINING, set(), 0, "cpu")

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
        train.freeze(network.train(), recipe, epoch=0)
        assert torch.equal(network[0](x), x) == rests
        assert network[1].training


def test_conversion_keeps_what_was_trained(trained, model, images, data):
    deployed = backends.get("fbgemm").convert(trained, model, images, RECIPE)
    assert deployed.quantized_modules == deployed.weight_modules == 3
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
    backend, recipe = backends.get("fbgemm"), RECIPE | dict(keep_fp32=("conv1", "bn1", "relu"))
    network = backend.prepare(model, images, recipe)
    recipe_of_training = TRAINING | dict(epochs=1)
    train.fit(network, data, recipe_of_training, head=set(), seed=0, device="cpu", resume=tmp_path / "x.resume", fingerprint="x")
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
        found = {name: backends.get(name).training(RECIPE) for name in torch_ao.ENGINES}
        assert {name for name in found if found[name] == found["fbgemm"]} == shared
        assert len({tag for tag, _ in found.values()}) == (1 if vnni else 2)  # else they would overwrite each other


@pytest.mark.parametrize("engine", ["qnnpack", "onednn"])
def test_one_training_serves_every_engine(trained, model, images, data, engine):
    backend = backends.get(engine)
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
    """torch's fused fake quantization would: it scales symmetric weights otherwise than conversion does."""
    deployed = backends.get("fbgemm").convert(trained, model, images, RECIPE)
    for name in ("conv1", "conv2", "fc"):
        layer = trained.model.get_submodule(name)
        weight = layer.weight
        if hasattr(layer, "bn"):
            weight = weight * (layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)).view(-1, 1, 1, 1)
        rounded = layer.weight_fake_quant(weight.detach())
        packed = deployed.predict.get_submodule(name).weight()
        assert torch.allclose(packed.dequantize(), rounded, rtol=1e-5, atol=1e-8)
        assert packed.int_repr().int().abs().max() == 127
