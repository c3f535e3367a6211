"""Trainings as scripts request them: done once, shared if equal, done again if anything differs."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import bright_and_dark
from torch import nn

from utils import architectures, checksums, environment, paths
from utils.catalog import Run
from utils.cli import Options
from utils.experiment import Experiment
from utils.recipes import Augmentation, Budget, FineTuning, Int8QAT, SmallImages, Training
from utils.training import checkpoints, loop, trainings
from utils.training.initial_weights import Start

RUN = Run("resnet18", "fp32", "fp32")
RECIPE = Training(
    epochs=2, batch_size=8, patience=0, backbone_lr=0.01, head_lr=0.03, warmup_epochs=1,
    weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0, augment=None, bn_momentum=0.1,
    amp=False,
)  # fmt: skip
FINE_TUNING = FineTuning(
    epochs=2, batch_size=8, keep="last", patience=0, backbone_lr=0.01, head_lr=0.03,
    warmup_epochs=1, weight_decay=0.01, clip_norm=1.0, augment=None, distill=True, amp=False,
)  # fmt: skip
QAT_RECIPE = Int8QAT(training=FINE_TUNING, ranges="minmax", calibration_images=16)


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
    """Let `load_baseline` also build a `Tiny`."""
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
    return trainings.train(RUN, start, images, recipe, options(tmp_path, **changes))


def checkpoints_in(folder):
    return {path for path in folder.iterdir() if path.suffix != ".lock"}


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
        RECIPE.describe(),
        "scratch",
        0,
        1,
    )
    assert facts["threads"] == torch.get_num_threads()
    assert trained.sha256 == checksums.sha256_of(trained.path) and not trained.model.training
    assert checkpoints_in(trained.path.parent) == {trained.path}  # nothing is left to resume
    forbid_training(monkeypatch)
    again = train(tmp_path, images)
    assert again.path.read_bytes() == written and again.sha256 == trained.sha256
    assert "training: reusing" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["start", "seed", "images"])
def test_whatever_decides_the_result_makes_it_another_training(
    tmp_path, monkeypatch, images, change
):
    train(tmp_path, images)
    forbid_training(monkeypatch)
    start, data, here = Start(Tiny(), frozenset(), "scratch"), images, options(tmp_path)
    if change == "start":
        start = Start(Tiny(), frozenset(), "the digest of a file")
    elif change == "seed":
        here = options(tmp_path, seed=1)
    else:
        data = dataclasses.replace(images, digest="1" * 64)
    with pytest.raises(AssertionError, match="trained again"):
        trainings.train(RUN, start, data, RECIPE, here)


CHANGED = dict(
    epochs=1, batch_size=4, patience=1, keep="last", backbone_lr=0.02, head_lr=0.02,
    warmup_epochs=0.5, weight_decay=0.1, label_smoothing=0.1, clip_norm=2.0,
    augment=Augmentation(crop=0.9, degrees=1), bn_momentum=0.2, amp=True,
    small=SmallImages(epochs=1, size=32), silent_branches=True,
)  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Training)])
def test_every_field_of_the_recipe_makes_it_another_training(tmp_path, monkeypatch, images, name):
    train(tmp_path, images)
    forbid_training(monkeypatch)
    with pytest.raises(AssertionError, match="trained again"):
        train(tmp_path, images, RECIPE.replace(**{name: CHANGED[name]}))


def changed(monkeypatch, path):
    """Let the code in `path` have another digest from now on."""
    syntax = environment.syntax_sha256
    file = paths.ROOT / path
    monkeypatch.setattr(
        environment, "syntax_sha256", lambda other: "0" * 64 if other == file else syntax(other)
    )


TRAINING_CODE = environment.code_of(*trainings.CODE)
QAT_CODE = set(environment.code_of(*trainings.QAT_CODE)) - set(TRAINING_CODE)


@pytest.mark.parametrize("path", TRAINING_CODE)
def test_other_code_makes_it_another_training(tmp_path, monkeypatch, images, path):
    train(tmp_path, images)
    forbid_training(monkeypatch)
    train(tmp_path, images)
    changed(monkeypatch, path)
    with pytest.raises(AssertionError, match="trained again"):
        train(tmp_path, images)


def test_the_code_that_trains_is_known():
    training = {f"utils/training/{name}.py" for name in ("trainings", "loop", "distributed")}
    data = {f"utils/data/{name}.py" for name in ("augmentation", "dataset", "decoding")}
    assert training | data <= set(TRAINING_CODE)
    names = (
        "initialize",
        "calibration",
        "fake_quant",
        "reconstruction",
        "equalization",
        "floating",
    )
    assert {f"utils/quantize/{name}.py" for name in names} <= QAT_CODE
    assert "utils/progress.py" not in TRAINING_CODE  # it computes nothing


@pytest.mark.parametrize("package", trainings.PACKAGES)
def test_another_version_makes_it_another_training(tmp_path, monkeypatch, images, package):
    train(tmp_path, images)
    forbid_training(monkeypatch)
    other = environment.versions() | {package: "0.0.1"}
    monkeypatch.setattr(environment, "versions", lambda: other)
    with pytest.raises(AssertionError, match="trained again"):
        train(tmp_path, images)


TWICE = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_trainings as tests
tests.architectures.build = lambda name: tests.Tiny(seed=9)
folder = Path({folder!r})
images = tests.bright_and_dark(folder / "images of process {number}")
(folder / "ready {number}").touch()
while len(list(folder.glob("ready *"))) < 2:
    pass
print(tests.train(folder, images, tests.RECIPE.replace(epochs=20)).sha256)
"""


def test_processes_that_ask_at_once_train_once(tmp_path):
    path = [str(folder) for folder in (Path(__file__).parent, paths.ROOT / "tests", paths.ROOT)]
    workers = []
    for number in range(2):
        code = TWICE.format(path=path, folder=str(tmp_path), number=number)
        command = [sys.executable, "-c", code]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sorted("training: saved" in text for text in said) == [False, True]
    assert sorted("training: reusing" in text for text in said) == [False, True]
    assert len({text.split()[-1] for text in said}) == 1  # one checkpoint


def test_a_checkpoint_of_other_settings_is_kept_beside_the_new_one(tmp_path, images):
    path = train(tmp_path, images).path
    first = path.read_bytes()
    train(tmp_path, images, RECIPE.replace(epochs=1))
    assert checkpoints.read(path)["training"]["recipe"]["epochs"] == 1
    [kept] = checkpoints_in(path.parent) - {path}
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
        f"training: {path} is damaged (its weights changed since they were stored)"
        in capsys.readouterr().out
    )


def test_a_smoke_run_takes_one_epoch(tmp_path, images):
    facts = train(tmp_path, images, smoke=True).training
    assert (
        len(facts["history"]) == 1
        and facts["recipe"]["batch_size"] == trainings.SMOKE["batch_size"]
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
    trainings.train(RUN, start, images, RECIPE, options(tmp_path))
    assert [setup.head for setup in collected] == [{"fc.weight", "fc.bias", "conv1.bias"}]
    assert collected[0].teacher is None


# ---- fine-tuning with quantization


class FakeBackend:
    """A backend that trains what it is given, by settings that may be shared."""

    def __init__(self, name="fbgemm", tag="", **settings):
        self.name, self.tag, self.settings = name, tag, settings

    def training_config(self, recipe):
        return self.tag, self.settings


@pytest.fixture
def experiment(tmp_path, images):
    here = options(tmp_path)
    return Experiment(Run("resnet18", "qat", "int8"), here, images, train(tmp_path, images))


def finetune(experiment, backend, recipe=QAT_RECIPE):
    return trainings.finetune(experiment, backend, copy.deepcopy(experiment.baseline.model), recipe)


def test_backends_that_train_alike_share_one_training(experiment, monkeypatch):
    first = finetune(experiment, FakeBackend("fbgemm", bits=8))
    assert first.path.name == "resnet18_qat_int8_seed0.pt" and not first.model.training
    assert (
        first.training["init"] == experiment.baseline.sha256
        and first.training["recipe"] == QAT_RECIPE.training.describe()
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


QAT_CHANGED = dict(
    training=FINE_TUNING.replace(epochs=1), ranges="mse", calibration_images=8, headroom=2.0,
    weight_scales="tensor", keep_fp32=("conv1",), equalize=True, bias_correction=True,
    reconstruct=True, overflow_fix="weights", portable=True, activation_scales="tensor",
)  # fmt: skip


@pytest.mark.parametrize("name", QAT_RECIPE.decisive())
def test_every_decisive_field_makes_it_another_qat(experiment, monkeypatch, name):
    if name in ("bits", "adaround"):
        pytest.skip("has one legal value in QAT to INT8")
    finetune(experiment, FakeBackend())
    forbid_training(monkeypatch)
    with pytest.raises(AssertionError, match="trained again"):
        finetune(experiment, FakeBackend(), QAT_RECIPE.replace(**{name: QAT_CHANGED[name]}))


def test_what_matters_only_later_shares_the_training(experiment, monkeypatch):
    first = finetune(experiment, FakeBackend())
    forbid_training(monkeypatch)
    later = QAT_RECIPE.replace(budget=Budget(sqnr_db=20.0), formats="auto", trials={"tried": []})
    assert finetune(experiment, FakeBackend(), later).sha256 == first.sha256


@pytest.mark.parametrize("path", sorted(QAT_CODE))
def test_other_code_of_the_method_makes_it_another_qat(experiment, monkeypatch, path):
    finetune(experiment, FakeBackend())
    forbid_training(monkeypatch)
    changed(monkeypatch, path)
    train(experiment.options.checkpoints.parent, experiment.data)  # FP32 is the same
    with pytest.raises(AssertionError, match="trained again"):
        finetune(experiment, FakeBackend())


@pytest.mark.parametrize("distill", [True, False])
def test_the_teacher_is_the_baseline_where_the_recipe_distills(experiment, monkeypatch, distill):
    collected = setups(monkeypatch)
    finetune(
        experiment,
        FakeBackend(),
        QAT_RECIPE.replace(training=FINE_TUNING.replace(distill=distill)),
    )
    assert [setup.teacher for setup in collected] == [
        experiment.baseline.model if distill else None
    ]
    assert collected[0].head == {"fc.weight", "fc.bias"}


def test_the_control_is_shared_by_the_scripts_of_a_model(experiment, monkeypatch):
    def control(dtype):
        here = dataclasses.replace(experiment, run=Run("resnet18", "qat", dtype))
        return finetune(here, FakeBackend("native"))

    first = control("int8")
    assert first.path.name == "resnet18_control_fp32_seed0.pt"
    forbid_training(monkeypatch)
    assert control("fp16").sha256 == first.sha256
