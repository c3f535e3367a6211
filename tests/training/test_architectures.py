"""The three networks, and what becomes of the files that their training may start from."""

import urllib.error

import pytest
import torch

from utils import cli
from utils.catalog import MODELS
from utils.errors import UserError
from utils.training import architectures

PARAMETERS = {"alexnet": 57_012_034, "resnet18": 11_177_538, "mobilenetv3": 1_519_906}


@pytest.fixture(scope="module")
def imagenet():
    """A MobileNetV3-Small state dict with 1000 classes, as torchvision's files have."""
    torch.manual_seed(0)
    return architectures.torchvision_models().mobilenet_v3_small(weights=None).state_dict()


def saved(tmp_path, content):
    torch.save(content, tmp_path / "init.pth")
    return str(tmp_path / "init.pth")


def refused(name, init):
    with pytest.raises(UserError) as caught:
        architectures.initialize(name, init, 0)
    assert len(str(caught.value).splitlines()) == 1 and "--init" in str(caught.value)
    return str(caught.value)


def check_loaded(model, source, but=()):
    """Assert that all of `source` is in `model`, except for the tensors named in `but`."""
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value.float() if value.is_floating_point() else value)
               for key, value in source.items() if key not in but)  # fmt: skip


HEAD = {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_networks_have_two_classes_and_the_published_number_of_parameters(name):
    with torch.device("meta"):  # shapes only: no time is lost on drawing weights
        model = architectures.build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    names = [key for key, _ in model.named_parameters()]
    assert (
        architectures.head(model, name)
        == set(names[-2:])
        == {f"{MODELS[name].head}.{part}" for part in ("weight", "bias")}
    )
    assert len(model.get_parameter(names[-2])) == 2
    assert model.training and model.architecture == name


def test_a_layer_is_no_head_because_its_name_begins_alike():
    model = torch.nn.Module()
    model.classifier = torch.nn.ModuleDict(
        {"3": torch.nn.Linear(1, 1), "30": torch.nn.Linear(1, 1)}
    )
    assert architectures.head(model, "mobilenetv3") == HEAD


def test_scratch_loads_nothing():
    start = architectures.initialize("mobilenetv3", "scratch", 0)
    assert (start.pretrained, start.digest) == (set(), "scratch") and start.model.training


def test_a_file_of_1000_classes_gives_all_but_the_head(tmp_path, imagenet, capsys):
    start = architectures.initialize("mobilenetv3", saved(tmp_path, imagenet), 0)
    check_loaded(start.model, imagenet, but=HEAD)
    assert start.pretrained == {key for key, _ in start.model.named_parameters()} - HEAD
    said = capsys.readouterr().out
    assert f"{len(imagenet) - 2} of {len(imagenet)} tensors from init.pth" in said
    assert "drawn at random: classifier.3.weight, classifier.3.bias\n" in said
    assert (
        "not used (no such name or another shape): classifier.3.weight, classifier.3.bias\n" in said
    )


def test_a_file_of_two_classes_gives_the_head_too_and_has_nothing_to_report(tmp_path, capsys):
    weights = architectures.build("mobilenetv3").state_dict()
    start = architectures.initialize("mobilenetv3", saved(tmp_path, weights), 0)
    check_loaded(start.model, weights)
    assert start.pretrained == {key for key, _ in start.model.named_parameters()}
    assert (
        capsys.readouterr().out == f"init: {len(weights)} of {len(weights)} tensors from init.pth\n"
    )


def test_a_file_of_the_convolutions_only_leaves_the_classifier_to_chance(
    tmp_path, imagenet, capsys
):
    features = {key: value for key, value in imagenet.items() if key.startswith("features.")}
    start = architectures.initialize("mobilenetv3", saved(tmp_path, features), 0)
    check_loaded(start.model, features)
    assert start.pretrained == {
        key for key, _ in start.model.named_parameters() if key.startswith("features.")
    }
    said = capsys.readouterr().out
    assert (
        "drawn at random: classifier.0.weight, classifier.0.bias, classifier.3.weight, classifier.3.bias\n"
        in said
    )
    assert "not used" not in said


def test_a_file_in_half_precision_gives_an_fp32_network(tmp_path, imagenet):
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in imagenet.items()
    }
    start = architectures.initialize("mobilenetv3", saved(tmp_path, half), 0)
    assert {parameter.dtype for parameter in start.model.parameters()} == {torch.float32}
    check_loaded(start.model, half, but=HEAD)


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": state, "optimizer": {"param_groups": []}},
    lambda state: {"model_state_dict": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {f"module.{key}": value for key, value in state.items()},
])  # fmt: skip
def test_training_checkpoints_are_unpacked(tmp_path, imagenet, wrap):
    start = architectures.initialize("mobilenetv3", saved(tmp_path, wrap(imagenet)), 0)
    check_loaded(start.model, imagenet, but=HEAD)
    assert len(start.pretrained) == len(list(start.model.parameters())) - 2


def test_what_a_file_has_too_much_is_said(tmp_path, imagenet, capsys):
    architectures.initialize(
        "mobilenetv3", saved(tmp_path, imagenet | {"extra.weight": torch.zeros(1)}), 0
    )
    assert "classifier.3.bias, extra.weight\n" in capsys.readouterr().out


def test_the_digest_tells_files_apart(tmp_path, imagenet):
    file = saved(tmp_path, imagenet)
    first = architectures.initialize("mobilenetv3", file, 0).digest
    assert architectures.initialize("mobilenetv3", file, 0).digest == first
    changed = imagenet | {"features.0.0.weight": imagenet["features.0.0.weight"] + 1e-6}
    assert architectures.initialize("mobilenetv3", saved(tmp_path, changed), 0).digest != first
    assert len(first) == 64 and cli.init_digest(file) != first  # the file is another now


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_another_architectures_file_is_refused(tmp_path, imagenet, name):
    assert f"none of its {len(imagenet)} tensors fits {name}" in refused(
        name, saved(tmp_path, imagenet)
    )


@pytest.mark.parametrize(
    "content", [b"", b"no tensors here", b"\x80\x04\x95", b"PK\x03\x04 cut off"]
)
def test_a_file_that_is_none_of_torchs_is_refused(tmp_path, content):
    (tmp_path / "init.pth").write_bytes(content)
    assert "not a state dict" in refused("mobilenetv3", str(tmp_path / "init.pth"))


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {}, {"epoch": 3}, {0: torch.zeros(3)}]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    refused("mobilenetv3", saved(tmp_path, content))


def test_a_pickled_network_is_refused_and_not_run(tmp_path):
    assert "not a state dict that torch can load safely" in refused(
        "mobilenetv3", saved(tmp_path, torch.nn.Linear(2, 2))
    )


def torchvision_gives(monkeypatch, answer):
    weights = architectures.torchvision_models().get_model_weights("mobilenet_v3_small")
    monkeypatch.setattr(weights, "get_state_dict", answer)


def test_imagenet_weights_are_torchvisions(monkeypatch, imagenet, capsys):
    torchvision_gives(monkeypatch, lambda _self, *_args, **_kwargs: imagenet)
    start = architectures.initialize("mobilenetv3", "imagenet", 0)
    check_loaded(start.model, imagenet, but=HEAD)
    assert (
        start.digest == "imagenet"
        and len(start.pretrained) == len(list(start.model.parameters())) - 2
    )
    assert "tensors from imagenet" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route to host"), TimeoutError("timed out")]
)
def test_imagenet_without_a_network_says_what_else_can_be_given(monkeypatch, error):
    def fail(_self, *_args, **_kwargs):
        raise error

    torchvision_gives(monkeypatch, fail)
    said = refused("mobilenetv3", "imagenet")
    assert "mobilenetv3" in said and "--init FILE" in said and "--init scratch" in said


def test_what_is_not_loaded_is_drawn_from_the_seed():
    first, again, other = (
        architectures.initialize("mobilenetv3", "scratch", seed).model for seed in (1, 1, 2)
    )
    assert torch.equal(first.classifier[3].weight, again.classifier[3].weight)
    assert not torch.equal(first.classifier[3].weight, other.classifier[3].weight)


@torch.no_grad()
def test_silent_branches_leave_the_shortcuts_alone_and_nothing_else():
    plain, silent = (architectures.initialize("mobilenetv3", "scratch", 0).model for _ in range(2))
    architectures.silence_branches(silent)
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
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path, why):
    message = refused(
        "mobilenetv3",
        saved(tmp_path, {"features.0.0.weight": torch.zeros(2), "classifier.3.bias": BAD[why]}),
    )
    assert f"the tensor classifier.3.bias {why}" in message
