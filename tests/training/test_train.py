"""Trainings as the scripts ask for them: done once, shared where they are alike, kept when the settings change."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import bright_and_dark
from torch import nn

from utils import architectures, checksums
from utils.catalog import Run
from utils.cli import Options
from utils.training import checkpoints, loop, sessions
from utils.training.initial_weights import Start
from utils.training.sessions import Experiment

RUN = Run("resnet18", "fp32", "fp32")
RECIPE = dict(
    epochs=2, batch_size=8, patience=0, backbone_lr=0.01, head_lr=0.03, warmup_epochs=1,
    weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0, augment=None, bn_momentum=0.1, amp=False,
)  # fmt: skip
QAT_RECIPE = dict(training=RECIPE | dict(distill=True, keep="last"), calibration_images=16)


class Tiny(nn.Module):
    """A network whose last layer has the name of ResNet-18's."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """`load_baseline` builds a `Tiny`, too."""
    monkeypatch.setattr(architectures, "build", lambda name: Tiny(seed=9))


@pytest.fixture
def images(tmp_path):
    return bright_and_dark(tmp_path / "images")


def options(tmp_path, **changes):
    return Options(
        ("native",), checkpoints=tmp_path / "checkpoints", results=tmp_path / "results", **changes
    )


def train(tmp_path, images, recipe=RECIPE, **changes):
    """Train a fresh network with everything drawn at random; return its checkpoint."""
    start = Start(Tiny(), frozenset(), "scratch")
    return sessions.train(RUN, start, images, recipe, options(tmp_path, **changes))


def forbid_training(monkeypatch):
    def fit(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "fit", fit)


# ---- FP32 baselines


def test_what_was_trained_on_one_device_is_measured_on_the_other(tmp_path, monkeypatch, images):
    trained = train(tmp_path, images)
    forbid_training(monkeypatch)
    again = train(tmp_path, images, device="cuda")
    assert again.sha256 == trained.sha256 and again.training["device"] == "cpu"


def test_a_training_leaves_its_checkpoint_and_is_not_done_twice(
    tmp_path, monkeypatch, images, capsys
):
    trained = train(tmp_path, images)
    written, facts = trained.path.read_bytes(), trained.training
    assert trained.path == tmp_path / "checkpoints/tiny/resnet18_fp32_seed0.pt"
    model = Tiny()
    setup = loop.Setup(
        {name for name, _ in model.named_parameters()}, 0, "cpu"
    )  # nothing was loaded: all learn as the head
    expected = loop.fit(model, images, RECIPE, setup, loop.Resume(tmp_path / "state", "f"))
    assert all(
        torch.equal(trained.model.state_dict()[name], value)
        for name, value in model.state_dict().items()
    )
    assert facts["best_epoch"] == expected["best_epoch"] and len(facts["history"]) == 2
    assert (facts["recipe"], facts["init"], facts["seed"], facts["processes"]) == (
        RECIPE,
        "scratch",
        0,
        1,
    )
    assert facts["threads"] == torch.get_num_threads()
    assert trained.sha256 == checksums.sha256_of(trained.path) and not trained.model.training
    assert [file.name for file in trained.path.parent.iterdir()] == [
        trained.path.name
    ]  # nothing is left to resume
    forbid_training(monkeypatch)
    again = train(tmp_path, images)
    assert again.path.read_bytes() == written and again.sha256 == trained.sha256
    assert "training: done before" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["recipe", "start", "seed", "images"])
def test_whatever_decides_the_outcome_makes_it_another_training(
    tmp_path, monkeypatch, images, change
):
    train(tmp_path, images)
    forbid_training(monkeypatch)
    start, recipe, data, here = (
        Start(Tiny(), frozenset(), "scratch"),
        RECIPE,
        images,
        options(tmp_path),
    )
    match change:
        case "recipe":
            recipe = RECIPE | dict(epochs=1)
        case "start":
            start = Start(Tiny(), frozenset(), "the digest of a file")
        case "seed":
            here = options(tmp_path, seed=1)
        case "images":
            data = copy.copy(images)
            object.__setattr__(data, "digest", "1" * 64)
    with pytest.raises(AssertionError, match="trained again"):
        sessions.train(RUN, start, data, recipe, here)


def test_a_checkpoint_of_other_settings_is_kept_beside_the_new_one(tmp_path, images):
    path = train(tmp_path, images).path
    first = path.read_bytes()
    train(tmp_path, images, RECIPE | dict(epochs=1))
    assert checkpoints.read(path)["training"]["recipe"]["epochs"] == 1
    [kept] = set(path.parent.iterdir()) - {path}
    assert kept.read_bytes() == first


def test_equal_trainings_make_equal_files_and_a_damaged_one_is_trained_again(
    tmp_path, images, capsys
):
    path = train(tmp_path, images).path
    first = path.read_bytes()
    content = torch.load(path, weights_only=True)
    next(iter(content["state_dict"].values())).neg_()
    torch.save(content, path)
    assert train(tmp_path, images).path.read_bytes() == first
    assert (
        f"training: {path} is damaged (its weights are not those that were stored)"
        in capsys.readouterr().out
    )


def test_a_smoke_run_takes_one_epoch(tmp_path, images):
    facts = train(tmp_path, images, smoke=True).training
    assert (
        len(facts["history"]) == 1 and facts["recipe"]["batch_size"] == sessions.SMOKE["batch_size"]
    )


def setups(monkeypatch):
    """Train nothing from now on; return the list that gets the `Setup` of each training."""
    collected = []
    monkeypatch.setattr(
        loop, "fit", lambda _model, _data, _recipe, setup, _resume: collected.append(setup) or {}
    )
    return collected


def test_only_what_was_not_loaded_and_the_last_layer_learn_at_the_rate_of_the_head(
    tmp_path, monkeypatch, images
):
    collected = setups(monkeypatch)
    start = Start(
        Tiny(),
        frozenset({"fc.weight", "fc.bias", "conv1.weight", "bn1.weight", "bn1.bias"}),
        "imagenet",
    )
    sessions.train(RUN, start, images, RECIPE, options(tmp_path))
    assert [setup.head for setup in collected] == [{"fc.weight", "fc.bias", "conv1.bias"}]
    assert collected[0].teacher is None


# ---- fine-tuning with quantization


class FakeBackend:
    """A backend that trains what it is given, by settings that may be shared."""

    def __init__(self, name="fbgemm", tag="", **settings):
        self.name, self.tag, self.settings = name, tag, settings

    def training(self, recipe):
        return self.tag, self.settings


@pytest.fixture
def experiment(tmp_path, images):
    here = options(tmp_path)
    return Experiment(Run("resnet18", "qat", "int8"), here, images, train(tmp_path, images))


def finetune(experiment, backend, recipe=QAT_RECIPE):
    return sessions.finetune(experiment, backend, copy.deepcopy(experiment.baseline.model), recipe)


def test_backends_that_train_alike_share_one_training(experiment, monkeypatch):
    first = finetune(experiment, FakeBackend("fbgemm", bits=8))
    assert first.path.name == "resnet18_qat_int8_seed0.pt" and not first.model.training
    assert (
        first.training["init"] == experiment.baseline.sha256
        and first.training["recipe"] == QAT_RECIPE["training"]
    )
    forbid_training(monkeypatch)
    second = finetune(experiment, FakeBackend("x86", bits=8))
    assert second.sha256 == first.sha256
    assert all(
        torch.equal(second.model.state_dict()[name], value)
        for name, value in first.model.state_dict().items()
    )
    with pytest.raises(AssertionError, match="trained again"):
        finetune(experiment, FakeBackend("x86", bits=7))


def test_a_tag_tells_the_checkpoints_of_two_trainings_apart(experiment):
    paths = {finetune(experiment, FakeBackend(tag=tag, tag_=tag)).path.name for tag in ("", "7bit")}
    assert paths == {"resnet18_qat_int8_seed0.pt", "resnet18_qat_int8_7bit_seed0.pt"}


@pytest.mark.parametrize("distill", [True, False])
def test_the_teacher_is_the_baseline_where_the_recipe_distills(experiment, monkeypatch, distill):
    collected = setups(monkeypatch)
    finetune(
        experiment,
        FakeBackend(),
        QAT_RECIPE | dict(training=QAT_RECIPE["training"] | dict(distill=distill)),
    )
    assert [setup.teacher for setup in collected] == [
        experiment.baseline.model if distill else None
    ]
    assert collected[0].head == {"fc.weight", "fc.bias"}


def test_the_control_is_shared_by_the_scripts_of_a_model(experiment, monkeypatch):
    def control(dtype):
        here = SimpleNamespace(**vars(experiment) | {"run": Run("resnet18", "qat", dtype)})
        return finetune(here, FakeBackend("native"))

    first = control("int8")
    assert first.path.name == "resnet18_control_fp32_seed0.pt"
    forbid_training(monkeypatch)
    assert control("fp16").sha256 == first.sha256
