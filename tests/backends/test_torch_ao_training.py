"""INT8 by QAT, from the float network to the artifact, and which engines share a training."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import bright_and_dark
from torch import nn

from utils import environment, metrics
from utils.backends import registry, torch_ao
from utils.measure import footprint
from utils.quantize import fake_quant, ptq, reconstruction
from utils.recipes import FineTuning, Int8QAT
from utils.training import loop
from utils.training.loop import Resume, Setup

ENGINES = [name for name in torch_ao.ENGINES if name in torch.backends.quantized.supported_engines]
TRAINING = FineTuning(
    epochs=2, batch_size=8, keep="last", patience=0, backbone_lr=1e-2, head_lr=1e-2,
    warmup_epochs=0, weight_decay=0.0, clip_norm=1.0, augment=None, amp=False, distill=False,
)  # fmt: skip
RECIPE = Int8QAT(ranges="mse", calibration_images=24, training=TRAINING)
SETUP = Setup(head=set(), seed=0, device="cpu")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Small(nn.Module):
    """BatchNorm with and without ReLU, a residual sum, hardswish, dropout, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act, self.pool = nn.Hardswish(), nn.AdaptiveAvgPool2d(1)
        self.dropout, self.fc = nn.Dropout(), nn.Linear(8, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.act(x + self.bn2(self.conv2(x)))
        return self.fc(self.dropout(torch.flatten(self.pool(x), 1)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return bright_and_dark(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def images(data):
    return data.train.calibration(24)


@pytest.fixture(scope="module")
def model(images):
    torch.manual_seed(0)
    model = Small().train()
    with torch.no_grad():
        for _ in range(20):  # statistics as a trained network has them
            model(images)
    return model.eval()


def fitted(network, data, folder, **changes):
    schedule = TRAINING.replace(**changes)
    loop.fit(network, data, schedule, SETUP, Resume(folder / "x.resume", "x"))
    return network.eval()


@pytest.fixture(scope="module")
def trained(model, images, data, tmp_path_factory):
    network = registry.get("fbgemm").prepare(model, images, RECIPE)
    return fitted(network, data, tmp_path_factory.mktemp("trained"))


def answers(network, x, engine="fbgemm"):
    torch.backends.quantized.engine = engine
    with torch.inference_mode():
        return network(x).numpy()


def test_training_starts_from_the_float_model(model, images):
    network = registry.get("fbgemm").prepare(model, images, RECIPE).eval()
    assert metrics.sqnr_db(answers(model, images), answers(network, images)) > 20


def test_training_starts_where_reconstruction_ends(model, images, monkeypatch):
    monkeypatch.setattr(reconstruction, "MOST_STEPS", 3)
    backend, recipe = registry.get(ENGINES[0]), RECIPE.replace(reconstruct=True)
    config = backend.qdq_config(recipe)
    prepared = fake_quant.to_integers(backend.prepare(model, images, recipe), (), config)
    assert prepared.digest() == ptq(model, images, recipe, config).digest()
    assert prepared.digest() != ptq(model, images, RECIPE, config).digest()


def test_weights_biases_and_ranges_learn(model, images, data):
    network = registry.get("fbgemm").prepare(model, images, RECIPE)
    parameters = network.named_parameters()
    before = {name: value.clone() for name, value in parameters if value.requires_grad}
    assert {name.rpartition(".")[2] for name in before} == {"weight", "bias", "stretch", "shift"}
    loop.Trainer(network, data, TRAINING, SETUP).epoch()
    stayed = set()
    for name, value in before.items():
        if torch.equal(network.get_parameter(name), value):
            stayed.add(name.rpartition(".")[2])
    assert stayed <= {"shift"}  # of a range that holds all values


def test_training_learns_the_classes(trained, model, data):
    x, y = next(data.train.batches(len(data.train)))
    logits = [torch.from_numpy(answers(network, x)) for network in (model, trained)]
    before, after = (F.cross_entropy(values, y) for values in logits)
    assert after < before


@pytest.mark.parametrize("engine", ENGINES)
def test_the_artifact_of_every_engine_answers_as_the_trained_network(
    trained, model, images, data, engine, tmp_path
):
    backend = registry.get(engine)
    deployed = backend.convert(trained, model, RECIPE)
    counts = footprint.of_numbers(deployed.stored)
    assert counts["quantized_modules"] == counts["weight_modules"] == 3
    x = next(data.test.batches(12))[0]
    rounded, integers = answers(trained, x), answers(deployed.predict, x, engine)
    sqnr = metrics.sqnr_db(rounded, integers)
    # Float sums and integer kernels round some values to different sides.
    assert sqnr is None or sqnr > 25
    assert np.array_equal(rounded.argmax(1), integers.argmax(1))
    deployed.save(tmp_path / "artifact")
    noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loaded = answers(backend.load(tmp_path / "artifact", "cpu"), noise, engine)
    assert np.array_equal(answers(deployed.predict, noise, engine), loaded)


def test_layers_kept_in_fp32_stay_as_they_are(model, images, data, tmp_path):
    backend, recipe = registry.get("fbgemm"), RECIPE.replace(keep_fp32=("conv1", "bn1", "relu"))
    network = fitted(backend.prepare(model, images, recipe), data, tmp_path, epochs=1)
    deployed = backend.convert(network, model, recipe)
    assert deployed.facts["quantized"] == ["conv2", "fc"]
    assert torch.equal(network.conv1.weight, deployed.quantized.fp32.conv1.weight)
    x = next(data.test.batches(12))[0]
    sqnr = metrics.sqnr_db(answers(network, x), answers(deployed.predict, x))
    assert sqnr is None or sqnr > 25


def test_engines_share_a_training_exactly_where_they_round_alike(monkeypatch):
    for vnni, shared in (
        (True, {"x86", "onednn", "qnnpack"}),
        (False, {"fbgemm", "x86", "onednn"}),
    ):
        monkeypatch.setattr(environment, "has_vnni", lambda *names, vnni=vnni: vnni or not names)
        configs = {name: registry.get(name).training_config(RECIPE) for name in torch_ao.ENGINES}
        assert {name for name in configs if configs[name] == configs["x86"]} == shared
        # With equal tags, they would overwrite each other.
        assert len({tag for tag, _ in configs.values()}) == 2


def test_onnxruntime_shares_the_training_of_torchs_engines():
    """Only its biases and logits differ, which are not part of a training."""
    configs = [registry.get(name).training_config(RECIPE) for name in ("onnxruntime", "x86")]
    assert configs[0] == configs[1]


def test_the_trained_weights_come_back_from_their_file(trained, model, images):
    again = registry.get("fbgemm").prepare(model, images, RECIPE)
    again.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert np.array_equal(answers(again.eval(), images), answers(trained, images))
