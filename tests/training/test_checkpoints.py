"""Trained weights on disk: names, damage, and the baseline that a quantized script asks for."""

import dataclasses

import pytest
import torch
from helpers import bright_and_dark
from torch import nn

from utils import architectures, checksums
from utils.catalog import Run
from utils.cli import Options
from utils.errors import UserError
from utils.training import checkpoints

RUN = Run("resnet18", "ptq", "int8")


@pytest.fixture
def options(tmp_path):
    return Options(("fbgemm",), checkpoints=tmp_path, results=tmp_path)


@pytest.fixture
def images(tmp_path):
    return bright_and_dark(tmp_path / "images")


@pytest.fixture
def baseline(monkeypatch, options, images):
    """The path of a baseline on `images`, of a small network."""
    monkeypatch.setattr(architectures, "build", lambda name: nn.Linear(2, 2))
    torch.manual_seed(0)
    path = checkpoints.path_of(RUN.baseline, images.study, options)
    checkpoints.save(
        path, "resnet18", nn.Linear(2, 2), images, {"fingerprint": "f", "training_dtype": "fp32"}
    )
    return path


def test_names_say_run_seed_and_what_was_trained_for_whom(options):
    qat = Run("resnet18", "qat", "int8")
    assert checkpoints.path_of(qat, "drawn", options).name == "resnet18_qat_int8_seed0.pt"
    assert (
        checkpoints.path_of(qat, "drawn", options.replace(seed=3), "7bit").name
        == "resnet18_qat_int8_7bit_seed3.pt"
    )
    assert (
        checkpoints.path_of(qat.on("native"), "drawn", options).name
        == "resnet18_control_fp32_seed0.pt"
    )
    assert (
        checkpoints.path_of(qat.baseline, "drawn", options)
        == options.checkpoints / "drawn/resnet18_fp32_seed0.pt"
    )


def test_a_fingerprint_is_of_values_not_of_their_order():
    assert checkpoints.fingerprint(a=1, b=(2, 3)) == checkpoints.fingerprint(b=[2, 3], a=1)
    assert checkpoints.fingerprint(a=1) != checkpoints.fingerprint(a=2)


def test_what_is_saved_comes_back(baseline, images):
    content = checkpoints.read(baseline)
    assert set(content) == {"state_dict", "format", "architecture", "data", "training"}
    assert content["data"] == images.describe()
    assert content["training"] == {"fingerprint": "f", "training_dtype": "fp32"}
    assert set(content["state_dict"]) == {"weight", "bias"}


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-100], lambda content: b"", lambda content: b"no checkpoint"],
)
def test_a_damaged_file_is_an_error_that_names_it(baseline, damage):
    baseline.write_bytes(damage(baseline.read_bytes()))
    with pytest.raises(UserError, match=r"resnet18_fp32_seed0.pt is damaged .*train it again"):
        checkpoints.read(baseline)


def changed(path, change):
    """Write the checkpoint at `path` again, with a valid file, after `change(content)`."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("change", [
    lambda content: content["state_dict"]["weight"].view(-1)[0].neg_(),
    lambda content: content["state_dict"].update(bias=content["state_dict"]["bias"].double()),
    lambda content: content.update(json=content["json"].replace("fp32", "bf16")),
    lambda content: content.pop("sha256"),
])  # fmt: skip
def test_weights_or_facts_that_were_changed_are_refused(baseline, change):
    changed(baseline, change)
    with pytest.raises(
        UserError, match=r"resnet18_fp32_seed0.pt is damaged .*changed since they were stored"
    ):
        checkpoints.read(baseline)


def test_a_checkpoint_of_another_version_is_told_apart_from_damage(baseline):
    changed(
        baseline,
        lambda content: content.update(json=content["json"].replace('"format": 2', '"format": 1')),
    )
    with pytest.raises(UserError, match="written by another version of this code; train it again"):
        checkpoints.read(baseline)


def test_a_missing_file_is_not_damaged(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoints.read(tmp_path / "none.pt")


def test_a_damaged_file_is_kept_when_it_is_trained_again(baseline, images):
    baseline.write_bytes(b"no checkpoint")
    checkpoints.save(baseline, "resnet18", nn.Linear(2, 2), images, {"fingerprint": "g"})
    assert baseline.with_name("resnet18_fp32_seed0.unreadab.pt").read_bytes() == b"no checkpoint"


def test_weights_of_the_same_settings_are_replaced(baseline, images):
    checkpoints.save(baseline, "resnet18", nn.Linear(2, 2), images, {"fingerprint": "f"})
    assert list(baseline.parent.glob("*.pt")) == [baseline]


def test_the_baseline_is_loaded_for_evaluation(baseline, options, images):
    loaded = checkpoints.load_baseline(RUN, images, options)
    assert (loaded.path, loaded.sha256) == (baseline, checksums.sha256_of(baseline))
    assert not loaded.model.training
    assert torch.equal(loaded.model.weight, checkpoints.read(baseline)["state_dict"]["weight"])
    assert loaded.training["training_dtype"] == "fp32"


def test_without_a_baseline_the_command_that_makes_it_is_given(options, images):
    with pytest.raises(
        UserError, match=r"no FP32 baseline at .*Make it first: python models/resnet18_fp32.py"
    ) as caught:
        checkpoints.load_baseline(RUN, images, options)
    assert "--backend" not in str(caught.value)  # fbgemm is none of the baseline's


def test_a_baseline_of_other_images_is_refused(baseline, options, images):
    others = dataclasses.replace(images, digest="1" * 64)
    with pytest.raises(
        UserError,
        match=r"trained on other images. Train it on these: python models/resnet18_fp32.py",
    ):
        checkpoints.load_baseline(RUN, others, options)


def test_a_baseline_of_another_model_or_order_of_classes_is_refused(baseline, options, images):
    swapped = dataclasses.replace(images, classes=images.classes[::-1])
    with pytest.raises(
        UserError,
        match=r"trained on other images. Train it on these: python models/resnet18_fp32.py",
    ):
        checkpoints.load_baseline(RUN, swapped, options)
    baseline.replace(checkpoints.path_of(Run("alexnet", "fp32", "fp32"), images.study, options))
    with pytest.raises(
        UserError, match=r"is of the model resnet18. Train alexnet: python models/alexnet_fp32.py"
    ):
        checkpoints.load_baseline(Run("alexnet", "ptq", "int8"), images, options)


def derived(baseline, write):
    code = ("utils.backends.onnx_export",)
    return checkpoints.derived(baseline, ".onnx", write, code, ("torch", "onnx"))


@pytest.fixture
def made():
    """A list of the files that were written, and the function that writes them."""
    files = []

    def write(path):
        files.append(path)
        path.write_bytes(b"graph")

    return files, write


def test_a_file_made_of_a_checkpoint_is_made_again_if_it_was_changed(baseline, made, capsys):
    files, write = made
    first = derived(baseline, write)
    assert derived(baseline, write) == first and len(files) == 1
    first.write_bytes(b"another network")
    assert derived(baseline, write).read_bytes() == b"graph" and len(files) == 2
    assert f"{first} is not what was written there, and is made again" in capsys.readouterr().out
    first.with_name(f"{first.name}.sha256").unlink()
    assert derived(baseline, write) == first and len(files) == 3


@pytest.mark.parametrize("change", ["code", "torch", "onnx", "weights"])
def test_a_file_made_of_a_checkpoint_depends_on_what_makes_it(baseline, made, monkeypatch, change):
    files, write = made
    first = derived(baseline, write)
    if change == "code":
        monkeypatch.setattr(checkpoints.environment, "code_of", lambda *modules: {"a": "b"})
    elif change == "weights":
        baseline.write_bytes(baseline.read_bytes() + b"\0")
    else:
        version = checkpoints.importlib.metadata.version
        monkeypatch.setattr(
            checkpoints.importlib.metadata,
            "version",
            lambda package: "0.0.1" if package == change else version(package),
        )
    assert derived(baseline, write) != first and len(files) == 2


def test_a_baseline_with_weights_that_are_not_finite_is_refused(options, images):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, torch.nan)
    path = checkpoints.path_of(RUN.baseline, images.study, options)
    checkpoints.save(path, "resnet18", model, images, {"fingerprint": "f"})
    with pytest.raises(
        UserError,
        match=r"tensor bias has 2 values that are infinite or NaN. Train it again: python models",
    ):
        checkpoints.load_baseline(RUN, images, options)
