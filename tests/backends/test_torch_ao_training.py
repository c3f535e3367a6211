"""INT8 by quantization-aware training, from the float network to the artifact; engines that round alike share a training."""

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
from utils.quantize import qat, reconstruction
from utils.training import loop
from utils.training.checkpoints import Checkpoint
from utils.training.loop import Resume, Setup

ENGINES = [name for name in torch_ao.ENGINES if name in torch.backends.quantized.supported_engines]
RECIPE = dict(bits=8, activations="mse", calibration_images=24, keep_fp32=())
TRAINING = dict(
    epochs=2, batch_size=8, keep="last", patience=0, backbone_lr=1e-2, head_lr=1e-2, warmup_epochs=0,
    weight_decay=0.0, label_smoothing=0.0, clip_norm=1.0, augment=None, amp=False,
)  # fmt: skip
SETUP = Setup(head=set(), seed=0, device="cpu")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Small(nn.Module):
    """Convolutions with BatchNorm, with and without ReLU, a residual sum, hardswish, dropout, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act, self.pool, self.dropout, self.fc = (
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Dropout(),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(
            self.dropout(torch.flatten(self.pool(self.act(x + self.bn2(self.conv2(x)))), 1))
        )


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
    loop.fit(network, data, TRAINING | changes, SETUP, Resume(folder / "x.resume", "x"))
    return Checkpoint(folder, network.eval(), "", {})


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
    monkeypatch.setattr(reconstruction, "STEPS", 3)
    backend, recipe = registry.get(ENGINES[0]), RECIPE | dict(reconstruct=True)
    prepared = qat.convert(
        backend.prepare(model, images, recipe), recipe, backend.qdq_config(recipe)
    )
    assert prepared.digest() == backend.quantized(model, images, recipe).digest()
    assert prepared.digest() != backend.quantized(model, images, RECIPE).digest()


def test_weights_biases_and_ranges_learn(model, images, data):
    network = registry.get("fbgemm").prepare(model, images, RECIPE)
    before = {
        name: value.clone() for name, value in network.named_parameters() if value.requires_grad
    }
    assert {name.rpartition(".")[2] for name in before} == {"weight", "bias", "stretch", "shift"}
    loop.Trainer(network, data, TRAINING, SETUP).epoch()
    stayed = {
        name.rpartition(".")[2]
        for name, value in before.items()
        if torch.equal(network.get_parameter(name), value)
    }
    assert stayed <= {"shift"}  # of a range beyond which nothing lies


def test_training_learns_the_classes(trained, model, data):
    x, y = next(data.train.batches(len(data.train)))
    before, after = (
        F.cross_entropy(torch.from_numpy(answers(network, x)), y)
        for network in (model, trained.model)
    )
    assert after < before


@pytest.mark.parametrize("engine", ENGINES)
def test_the_artifact_of_every_engine_answers_as_the_trained_network(
    trained, model, images, data, engine, tmp_path
):
    backend = registry.get(engine)
    deployed = backend.convert(trained, model, images, RECIPE)
    assert deployed.fake_quant is trained.model
    counts = footprint.of_numbers(deployed.stored)
    assert counts["quantized_modules"] == counts["weight_modules"] == 3
    x = next(data.test.batches(12))[0]
    rounded, integers = answers(trained.model, x), answers(deployed.predict, x, engine)
    sqnr = metrics.sqnr_db(rounded, integers)
    assert (
        sqnr is None or sqnr > 25
    )  # float sums and integer kernels round some values to different sides
    assert np.array_equal(rounded.argmax(1), integers.argmax(1))
    deployed.save(tmp_path / "artifact")
    noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(
        answers(deployed.predict, noise, engine),
        answers(backend.load(tmp_path / "artifact", "cpu"), noise, engine),
    )


def test_layers_kept_in_fp32_stay_as_they_are(model, images, data, tmp_path):
    backend, recipe = registry.get("fbgemm"), RECIPE | dict(keep_fp32=("conv1", "bn1", "relu"))
    checkpoint = fitted(backend.prepare(model, images, recipe), data, tmp_path, epochs=1)
    deployed = backend.convert(checkpoint, model, images, recipe)
    assert deployed.facts["quantized"] == ["conv2", "fc"]
    assert torch.equal(checkpoint.model.conv1.weight, deployed.fp32.conv1.weight)
    x = next(data.test.batches(12))[0]
    sqnr = metrics.sqnr_db(answers(checkpoint.model, x), answers(deployed.predict, x))
    assert sqnr is None or sqnr > 25


def test_engines_share_a_training_exactly_where_they_round_alike(monkeypatch):
    for vnni, shared in (
        (True, {"x86", "onednn", "qnnpack"}),
        (False, {"fbgemm", "x86", "onednn"}),
    ):
        monkeypatch.setattr(environment, "has_vnni", lambda vnni=vnni: vnni)
        trainings = {name: registry.get(name).training(RECIPE) for name in torch_ao.ENGINES}
        assert {name for name in trainings if trainings[name] == trainings["x86"]} == shared
        assert (
            len({tag for tag, _ in trainings.values()}) == 2
        )  # else they would overwrite each other


def test_onnxruntime_shares_the_training_of_torchs_engines():
    """Its biases and logits, which are all that differs, are not part of a training."""
    assert registry.get("onnxruntime").training(RECIPE) == registry.get("x86").training(RECIPE)


@pytest.mark.parametrize(
    "change",
    [
        dict(activations="minmax"), dict(keep_fp32=("fc",)), dict(calibration_images=8), dict(headroom=2.0),
        dict(bias_correction=True), dict(equalize=True),
    ],
)  # fmt: skip
def test_settings_that_decide_what_is_trained_are_told(change):
    backend = registry.get("fbgemm")
    _, settings = backend.training(RECIPE)
    assert backend.training(RECIPE | change)[1] == settings | change
    assert backend.training(RECIPE | dict(training=TRAINING)) == backend.training(RECIPE)


def test_the_trained_weights_come_back_from_their_file(trained, model, images):
    again = registry.get("fbgemm").prepare(model, images, RECIPE)
    again.load_state_dict(copy.deepcopy(trained.model.state_dict()))
    assert np.array_equal(answers(again.eval(), images), answers(trained.model, images))
