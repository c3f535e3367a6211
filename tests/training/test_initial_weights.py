"""The weights that training starts from, and the files that may hold them."""

import argparse
import datetime
import io
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import architectures, cli
from utils.errors import UserError
from utils.training import initial_weights

HEAD = {"classifier.3.weight", "classifier.3.bias"}


@pytest.fixture(scope="module")
def imagenet():
    """State dict of a MobileNetV3-Small with 1000 classes, as in torchvision's files."""
    torch.manual_seed(0)
    return architectures.torchvision_models().mobilenet_v3_small(weights=None).state_dict()


def saved(tmp_path, content):
    torch.save(content, tmp_path / "init.pth")
    return str(tmp_path / "init.pth")


def refused(name, init):
    with pytest.raises(UserError) as caught:
        initial_weights.initialize(name, init, 0)
    assert len(str(caught.value).splitlines()) == 1 and "--init" in str(caught.value)
    return str(caught.value)


def check_loaded(model, source, leave_out=()):
    """Assert that `model` has all tensors of `source`, except those named in `leave_out`."""
    weights = model.state_dict()
    for key, value in source.items():
        if key not in leave_out:
            expected = value.float() if value.is_floating_point() else value
            assert torch.equal(weights[key], expected), key


def test_scratch_loads_nothing():
    start = initial_weights.initialize("mobilenetv3", "scratch", 0)
    assert (start.pretrained, start.digest) == (set(), "scratch") and start.model.training


def test_a_file_with_1000_classes_gives_everything_except_the_head(tmp_path, imagenet, capsys):
    start = initial_weights.initialize("mobilenetv3", saved(tmp_path, imagenet), 0)
    check_loaded(start.model, imagenet, leave_out=HEAD)
    assert start.pretrained == {key for key, _ in start.model.named_parameters()} - HEAD
    said = capsys.readouterr().out
    assert f"{len(imagenet) - 2} of {len(imagenet)} tensors from init.pth" in said
    assert "drawn at random: classifier.3.weight, classifier.3.bias\n" in said
    unused = "classifier.3.weight, classifier.3.bias"
    assert f"not used (unknown name or another shape): {unused}\n" in said


def test_a_file_with_two_classes_also_gives_the_head_and_nothing_is_missing(tmp_path, capsys):
    weights = architectures.build("mobilenetv3").state_dict()
    start = initial_weights.initialize("mobilenetv3", saved(tmp_path, weights), 0)
    check_loaded(start.model, weights)
    assert start.pretrained == {key for key, _ in start.model.named_parameters()}
    assert (
        capsys.readouterr().out == f"init: {len(weights)} of {len(weights)} tensors from init.pth\n"
    )


def test_a_file_with_only_the_convolutions_leaves_the_classifier_random(tmp_path, imagenet, capsys):
    features = {key: value for key, value in imagenet.items() if key.startswith("features.")}
    start = initial_weights.initialize("mobilenetv3", saved(tmp_path, features), 0)
    check_loaded(start.model, features)
    assert start.pretrained == {
        key for key, _ in start.model.named_parameters() if key.startswith("features.")
    }
    said = capsys.readouterr().out
    missing = "classifier.0.weight, classifier.0.bias, classifier.3.weight, classifier.3.bias"
    assert f"drawn at random: {missing}\n" in said
    assert "not used" not in said


def test_a_file_in_half_precision_gives_an_fp32_network(tmp_path, imagenet):
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in imagenet.items()
    }
    start = initial_weights.initialize("mobilenetv3", saved(tmp_path, half), 0)
    assert {parameter.dtype for parameter in start.model.parameters()} == {torch.float32}
    check_loaded(start.model, half, leave_out=HEAD)


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def inside(part, state):
    """Insert `part` after the first part of every name, as a wrapper of a submodule does."""
    return {key.replace(".", f".{part}.", 1): value for key, value in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
CONTAINERS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": OPTIMIZER},
    "model_state_dict": lambda state: {"model_state_dict": prefixed("module.", state)},
    "net": lambda state: {"epoch": 4, "net": state, "acc": 95.0},
    "model_state": lambda state: {"optimizer": OPTIMIZER, "model_state": state},
    "weights": lambda state: {"weights": state},
    "EMA alone": lambda state: {"ema": prefixed("module.", state) | {"n_averaged": torch.ones(())}},
    "any key": lambda state: {"run": {"student": {"parameters": state}}},
    "DataParallel": lambda state: prefixed("module.", state),
    "torch.compile": lambda state: prefixed("_orig_mod.", state),
    "both": lambda state: prefixed("_orig_mod.module.", state),
    "Lightning": lambda state: {"state_dict": prefixed("model.", state)},
    "its name": lambda state: prefixed("mobilenetv3.", state),
    "deep": lambda state: prefixed("trainer.net.0.", state),
    "DataParallel around a part": lambda state: inside("module", state),
    "compiled part": lambda state: prefixed("model.", inside("_orig_mod", state)),
    "next to a loss": lambda state: prefixed("net.", state) | {"loss.weight": torch.ones(2)},
    "arguments": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, path="a/b")},
    "a NumPy number": lambda state: {"model": state, "best": np.float64(69.7), "n": np.int64(3)},
    "a NumPy array": lambda state: {"model": state, "curve": np.linspace(0, 1, 3)},
    "a path and a date": lambda state: {
        "model": state, "to": Path("a/b"), "at": datetime.datetime(2026, 1, 1)
    },
}  # fmt: skip


@pytest.mark.parametrize("wrap", CONTAINERS)
def test_checkpoints_are_unpacked(tmp_path, imagenet, wrap):
    init = saved(tmp_path, CONTAINERS[wrap](imagenet))
    start = initial_weights.initialize("mobilenetv3", init, 0)
    check_loaded(start.model, imagenet, leave_out=HEAD)
    assert len(start.pretrained) == len(list(start.model.parameters())) - 2


def test_the_network_is_taken_before_its_average_and_both_are_told_apart(
    tmp_path, imagenet, capsys
):
    average = {key: value + 1 for key, value in imagenet.items()}
    start = initial_weights.initialize(
        "mobilenetv3", saved(tmp_path, {"model_ema": average, "model": imagenet}), 0
    )
    check_loaded(start.model, imagenet, leave_out=HEAD)
    assert "tensors from init.pth (model)\n" in capsys.readouterr().out


def test_two_networks_under_two_prefixes_are_refused(tmp_path, imagenet):
    both = prefixed("teacher.", imagenet) | prefixed("student.", imagenet)
    message = refused("mobilenetv3", saved(tmp_path, both))
    assert "several networks (teacher., student.)" in message


def without(state, *starts):
    return {key: value for key, value in state.items() if not key.startswith(starts)}


INCOMPLETE = {
    "a layer is missing": (
        lambda state: without(state, "features.3.block.0"), "missing: features.3.block.0.0.weight"
    ),
    "only one layer": (
        lambda state: {key: state[key] for key in ("features.0.0.weight",)},
        "only 1 of the 244 tensors of mobilenetv3 fit",
    ),
    "another shape": (
        lambda state: state | {"features.0.0.weight": torch.zeros(8, 3, 3, 3)},
        "missing: features.0.0.weight; not used: features.0.0.weight",
    ),
    "one too many": (
        lambda state: state | {"features.13.weight": torch.zeros(1)}, "not used: features.13.weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_weights_that_fit_in_part_are_refused_unless_that_is_meant(tmp_path, imagenet, case):
    change, words = INCOMPLETE[case]
    init = saved(tmp_path, change(imagenet))
    message = refused("mobilenetv3", init)
    assert words in message and "--init-partial" in message
    start = initial_weights.initialize("mobilenetv3", init, 0, partial=True)
    assert start.pretrained


@pytest.mark.parametrize(
    ("name", "other"),
    [("resnet18", "resnet34"), ("resnet18", "resnet50"), ("mobilenetv3", "mobilenet_v3_large")],
)
def test_weights_of_a_relative_are_refused_and_recognised(tmp_path, name, other):
    state = getattr(architectures.torchvision_models(), other)(weights=None).state_dict()
    assert f"the file looks like {other} (" in refused(name, saved(tmp_path, state))


def test_the_digest_identifies_the_file(tmp_path, imagenet):
    file = saved(tmp_path, imagenet)
    first = initial_weights.initialize("mobilenetv3", file, 0).digest
    assert initial_weights.initialize("mobilenetv3", file, 0).digest == first
    changed = imagenet | {"features.0.0.weight": imagenet["features.0.0.weight"] + 1e-6}
    assert initial_weights.initialize("mobilenetv3", saved(tmp_path, changed), 0).digest != first
    assert len(first) == 64 and cli.init_digest(file) != first  # `file` was overwritten


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_a_file_from_another_architecture_is_refused(tmp_path, imagenet, name):
    message = refused(name, saved(tmp_path, imagenet))
    assert "only 0 of the" in message and "the file looks like mobilenet_v3_small" in message


@pytest.mark.parametrize(
    "content", [b"", b"no tensors here", b"\x80\x04\x95", b"PK\x03\x04 cut off"]
)
def test_a_file_that_torch_cannot_load_is_refused(tmp_path, content):
    (tmp_path / "init.pth").write_bytes(content)
    assert "not a state dict" in refused("mobilenetv3", str(tmp_path / "init.pth"))


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {}, {"epoch": 3}, {0: torch.zeros(3)}]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    refused("mobilenetv3", saved(tmp_path, content))


def test_a_pickled_network_is_refused_without_running_it_and_its_class_is_named(tmp_path):
    message = refused("mobilenetv3", saved(tmp_path, torch.nn.Linear(2, 2)))
    assert "not a state dict that torch can load safely" in message
    assert "torch.nn.modules.linear.Linear" in message and "weights_only=False" in message


def as_tar(path):
    """Write a file with the members of torch's oldest format."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = 30
            tar.addfile(member, io.BytesIO(bytes(30)))


FORMATS = {
    "a tar file": as_tar,
    "a TorchScript file": lambda path: torch.jit.save(
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path
    ),
    "a NumPy archive": lambda path: np.savez(path.open("wb"), a=np.zeros(2)),
    "an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)),
    "a safetensors file": lambda path: path.write_bytes(
        (48).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1]}}'.ljust(48) + bytes(4)
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_other_formats_are_named(tmp_path, kind):
    FORMATS[kind](tmp_path / "init.pth")
    assert f"this is {kind}" in refused("mobilenetv3", str(tmp_path / "init.pth"))


def torchvision_gives(monkeypatch, answer):
    weights = architectures.torchvision_models().get_model_weights("mobilenet_v3_small")
    monkeypatch.setattr(weights, "get_state_dict", answer)


def test_imagenet_weights_come_from_torchvision(monkeypatch, imagenet, capsys):
    torchvision_gives(monkeypatch, lambda _self, *_args, **_kwargs: imagenet)
    start = initial_weights.initialize("mobilenetv3", "imagenet", 0)
    check_loaded(start.model, imagenet, leave_out=HEAD)
    assert (
        start.digest == "imagenet"
        and len(start.pretrained) == len(list(start.model.parameters())) - 2
    )
    assert "tensors from imagenet" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route to host"), TimeoutError("timed out")]
)
def test_without_internet_access_imagenet_names_the_alternatives(monkeypatch, error):
    def fail(_self, *_args, **_kwargs):
        raise error

    torchvision_gives(monkeypatch, fail)
    said = refused("mobilenetv3", "imagenet")
    assert "mobilenetv3" in said and "--init FILE" in said and "--init scratch" in said


def test_the_seed_decides_the_random_weights():
    first, again, other = (
        initial_weights.initialize("mobilenetv3", "scratch", seed).model for seed in (1, 1, 2)
    )
    assert torch.equal(first.classifier[3].weight, again.classifier[3].weight)
    assert not torch.equal(first.classifier[3].weight, other.classifier[3].weight)


@torch.no_grad()
def test_silent_branches_leave_only_the_shortcuts():
    plain, silent = (
        initial_weights.initialize("mobilenetv3", "scratch", 0).model for _ in range(2)
    )
    initial_weights.silence_branches(silent)
    blocks = [block for block in silent.modules() if getattr(block, "use_res_connect", False)]
    assert len(blocks) == 6  # of 11: the others change the number of channels or the resolution
    for block in blocks:
        x = torch.randn(2, block.block[0][0].in_channels, 7, 7)
        assert torch.equal(block(x), x)
    changed = sum(
        not torch.equal(a, b) for a, b in zip(plain.parameters(), silent.parameters(), strict=True)
    )
    assert changed == len(blocks)


BAD = {
    "has 1 values that are infinite or NaN": torch.tensor([1.0, torch.nan]),
    "has 2 values that are infinite or NaN": torch.tensor([torch.inf, -torch.inf]),
    "is sparse": torch.eye(2).to_sparse(),
    "is complex": torch.zeros(2, dtype=torch.complex64),
    "has a shape but no values": torch.empty(2, device="meta"),
    "is quantized": torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.quint8),
}


@pytest.mark.parametrize("why", BAD)
def test_tensors_that_cannot_be_weights_are_refused_by_name(tmp_path, why):
    content = {"features.0.0.weight": torch.zeros(2), "classifier.3.bias": BAD[why]}
    message = refused("mobilenetv3", saved(tmp_path, content))
    assert f"the tensor classifier.3.bias {why}" in message
