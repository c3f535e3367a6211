"""The weights that training starts from, and the files that may hold them."""

import urllib.error

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


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": state, "optimizer": {"param_groups": []}},
    lambda state: {"model_state_dict": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {f"module.{key}": value for key, value in state.items()},
])  # fmt: skip
def test_training_checkpoints_are_unpacked(tmp_path, imagenet, wrap):
    start = initial_weights.initialize("mobilenetv3", saved(tmp_path, wrap(imagenet)), 0)
    check_loaded(start.model, imagenet, leave_out=HEAD)
    assert len(start.pretrained) == len(list(start.model.parameters())) - 2


def test_superfluous_tensors_of_a_file_are_listed(tmp_path, imagenet, capsys):
    initial_weights.initialize(
        "mobilenetv3", saved(tmp_path, imagenet | {"extra.weight": torch.zeros(1)}), 0
    )
    assert "classifier.3.bias, extra.weight\n" in capsys.readouterr().out


def test_the_digest_identifies_the_file(tmp_path, imagenet):
    file = saved(tmp_path, imagenet)
    first = initial_weights.initialize("mobilenetv3", file, 0).digest
    assert initial_weights.initialize("mobilenetv3", file, 0).digest == first
    changed = imagenet | {"features.0.0.weight": imagenet["features.0.0.weight"] + 1e-6}
    assert initial_weights.initialize("mobilenetv3", saved(tmp_path, changed), 0).digest != first
    assert len(first) == 64 and cli.init_digest(file) != first  # `file` was overwritten


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_a_file_from_another_architecture_is_refused(tmp_path, imagenet, name):
    assert f"none of its {len(imagenet)} tensors fits {name}" in refused(
        name, saved(tmp_path, imagenet)
    )


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


def test_a_pickled_network_is_refused_without_running_it(tmp_path):
    assert "not a state dict that torch can load safely" in refused(
        "mobilenetv3", saved(tmp_path, torch.nn.Linear(2, 2))
    )


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
