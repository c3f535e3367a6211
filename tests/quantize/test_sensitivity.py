"""Which blocks there are, how they are ranked, and which of them `keep_fp32="auto"` keeps in FP32.

Most tests use a backend whose damage is known: block number `b` disturbs image number `b` alone, so the noise of several blocks
adds up exactly and everything can be computed by hand.
"""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import numbered_split, split_of
from torch import nn

from utils.backends import registry
from utils.catalog import MODELS
from utils.data.augmentation import MEAN, STD
from utils.errors import UserError
from utils.quantize import layers, sensitivity
from utils.training import architectures

NAMES = ("a", "b", "c", "d", "e")
IMAGES = 10  # with logits (0, 10) or (0, -10), of power 1000 together
CALIBRATION = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 3, 4, 4)


def answer(x):
    """Logits (n, 2) of images that show their number: the class is its last bit."""
    number = (255 * (x[:, 0, 0, 0] * STD[0] + MEAN[0])).round().long()
    return number, torch.stack([torch.zeros(len(x)), torch.where(number % 2 == 1, 10.0, -10.0)], 1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(1, 1))

    def forward(self, x):
        assert not self.training
        return answer(x)[1]


class Fake:
    """A backend. `damage`: what quantizing a block adds in power, on the image of its number and towards the other class."""

    name = "fake"

    def __init__(self, **damage):
        self.damage, self.calls = damage, []

    def quantize(self, model, images, recipe):
        keep = recipe["keep_fp32"]
        assert isinstance(keep, tuple)
        self.calls.append((keep, images[:, 0, 0, 0].tolist()))
        noise = torch.tensor([0.0 if name in keep else math.sqrt(self.damage[name]) for name in NAMES] + [0.0] * 5)

        def predict(x):  # a plain function, as engines outside torch have
            number, logits = answer(x)
            logits[:, 1] -= logits[:, 1].sign() * noise[number]
            return logits

        return SimpleNamespace(predict=predict)


QUIET = dict(a=10, b=1, c=100, d=0.1, e=0)  # no decision changes
FLIPS = dict(a=121, b=144, c=169, d=196, e=0)  # noise above 10: the first four images change sides


@pytest.fixture
def validation(tmp_path):
    labels = np.arange(IMAGES) % 2
    labels[1] = 0  # FP32 is wrong here, so noise on image 1 (of block b) mends it
    return numbered_split(tmp_path, labels)


def choose(backend, validation, **auto):
    return sensitivity.choose_fp32_blocks(backend, Model(), CALIBRATION, validation, recipe_of(**auto))


def recipe_of(**auto):
    return dict(keep_fp32="auto", auto=auto, activations="any")


def chosen(damage, validation, **auto):
    return choose(Fake(**damage), validation, **auto)["keep_fp32"]


# ---- blocks


EXPECTED = {
    "alexnet": [f"features.{n}" for n in (0, 3, 6, 8, 10)] + [f"classifier.{n}" for n in (1, 4, 6)],
    "resnet18": ["conv1", *(f"layer{n}.{m}" for n in (1, 2, 3, 4) for m in (0, 1)), "fc"],
    "mobilenetv3": [*(f"features.{n}" for n in range(13)), "classifier.0", "classifier.3"],
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_hold_each_weighted_layer_once_in_the_order_of_computation(name):
    model = architectures.build(name).eval()
    blocks = sensitivity.blocks(model)
    assert list(blocks) == EXPECTED[name]
    holders = {layer: [block for block in blocks if f"{layer}.".startswith(f"{block}.")] for layer in layers.weighted(model)}
    assert all(len(names) == 1 for names in holders.values()), holders
    assert {names[0] for names in holders.values()} == set(blocks)  # and no block is without any
    with layers.outputs({block: model.get_submodule(block) for block in blocks}) as outputs, torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))
    assert list(outputs) == list(blocks)


def test_only_plain_sequences_are_taken_apart():
    class Unit(nn.Sequential):
        pass

    inner = nn.Sequential(nn.ReLU(), Unit(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Linear(1, 1)))
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), inner)
    assert sensitivity.blocks(model) == ("1.1", "1.2.0")


# ---- the scan


def test_scan_quantizes_one_block_at_a_time(validation):
    backend = Fake(**QUIET)
    reference = answer(torch.cat([x for x, _ in validation.batches(IMAGES)]))[1].numpy()

    def quantize(keep):
        return backend.quantize(None, CALIBRATION, {"keep_fp32": keep}).predict

    sqnr = sensitivity.scan(quantize, NAMES, reference, validation)
    assert [keep for keep, _ in backend.calls] == [
        ("b", "c", "d", "e"), ("a", "c", "d", "e"), ("a", "b", "d", "e"), ("a", "b", "c", "e"), ("a", "b", "c", "d"),
    ]  # fmt: skip
    assert list(sqnr) == list(NAMES)
    assert sqnr.pop("e") is None
    assert sqnr == pytest.approx({"a": 20, "b": 30, "c": 10, "d": 40}, abs=1e-4)  # 1000 over the block's power


# ---- the choice


def test_auto_keeps_the_worst_blocks_until_the_budget_is_met(validation, capsys):
    backend, recipe = Fake(**QUIET), recipe_of(sqnr_db=20.0, calibration_images=4)
    model = Model().train()
    chosen_recipe = sensitivity.choose_fp32_blocks(backend, model, CALIBRATION, validation, recipe)
    log = chosen_recipe.pop("sensitivity")
    assert model.training
    assert chosen_recipe == recipe | {"keep_fp32": ("a", "c")}  # in the network's order, though c is the worse one
    assert recipe == recipe_of(sqnr_db=20.0, calibration_images=4)
    assert list(log) == ["scan", "order", "tried", "budget", "images"]
    assert log["order"] == ["c", "a", "b", "d", "e"]
    assert log["scan"]["e"] is None and log["scan"]["c"] == pytest.approx(10, abs=1e-4)
    assert [trial["keep_fp32"] for trial in log["tried"]] == [[], ["c"], ["a", "c"]]
    noise = [111.1, 11.1, 1.1]
    assert [trial["sqnr_db"] for trial in log["tried"]] == pytest.approx(
        [10 * math.log10(1000 / power) for power in noise], abs=1e-4
    )
    # c's noise is as large as its image's logit: 0 against 0 is class 0, as before
    assert all(trial["agreement"] == 1 and trial["accuracy_drop"] == 0 for trial in log["tried"])
    assert log["budget"] == {"sqnr_db": 20.0} and log["images"] == IMAGES
    assert json.loads(json.dumps(log, allow_nan=False)) == log
    expected = "keep_fp32: a, c (of 5 blocks) meet sqnr_db >= 20.0 with 29.6 dB on 10 validation images\n"
    assert capsys.readouterr().out == expected
    # The scan calibrates on a few images from everywhere, the trials on all.
    assert [images for _, images in backend.calls[:5]] == [[0, 3, 6, 9]] * 5
    assert [images for _, images in backend.calls[5:]] == [list(range(12))] * 3
    assert [keep for keep, _ in backend.calls[5:]] == [(), ("c",), ("a", "c")]


@pytest.mark.parametrize(
    ("limit", "keep"),
    [(9.5, ()), (9.6, ("c",)), (19.5, ("c",)), (19.6, ("a", "c")), (39.9, ("a", "b", "c")), (41, ("a", "b", "c", "d"))],
)
def test_no_block_more_is_kept_than_the_sqnr_asks_for(validation, limit, keep):
    assert chosen(QUIET, validation, sqnr_db=limit) == keep


# FP32 has 9 of 10 right. Quantizing c, d or a loses one image, quantizing b gains one. The order is d, c, b, a, e, so keeping
# 0, 1, 2, 3, 4 blocks gives drops of 0.2, 0.1, 0, 0.1, 0.
@pytest.mark.parametrize(("limit", "keep"), [(0.2, ()), (0.19, ("d",)), (0.1, ("d",)), (0.05, ("c", "d")), (0.0, ("c", "d"))])
def test_a_budget_of_accuracy(validation, limit, keep):
    assert chosen(FLIPS, validation, accuracy_drop=limit) == keep


def test_accuracy_and_agreement_are_those_of_the_quantized_network(validation, capsys):
    log = choose(Fake(**FLIPS), validation, accuracy_drop=0.0)["sensitivity"]
    assert log["order"] == ["d", "c", "b", "a", "e"]
    assert [trial["accuracy_drop"] for trial in log["tried"]] == [0.2, 0.1, 0.0]
    assert [trial["agreement"] for trial in log["tried"]] == [0.6, 0.7, 0.8]
    expected = "keep_fp32: c, d (of 5 blocks) meet accuracy_drop <= 0.0 with a drop of 0.0000 on 10 validation images\n"
    assert capsys.readouterr().out == expected


def test_a_budget_of_both_is_met_when_each_is(validation):
    # With 2, 3, 4 blocks kept: 1000 / (121 + 144) = 5.8 dB, 1000 / 121 = 9.2 dB, no noise.
    assert chosen(FLIPS, validation, sqnr_db=5.0, accuracy_drop=0.0) == ("c", "d")
    assert chosen(FLIPS, validation, sqnr_db=8.0) == ("b", "c", "d")
    assert chosen(FLIPS, validation, sqnr_db=8.0, accuracy_drop=0.0) == ("a", "b", "c", "d")
    assert chosen(FLIPS, validation, sqnr_db=1.0, accuracy_drop=0.15) == ("d",)


def test_nothing_is_kept_where_nothing_needs_to_be(validation, capsys):
    backend = Fake(a=0, b=0, c=0, d=0, e=0)
    chosen_recipe = choose(backend, validation, sqnr_db=60.0)
    log = chosen_recipe.pop("sensitivity")
    assert chosen_recipe["keep_fp32"] == () and log["order"] == list(NAMES) and log["tried"][0]["sqnr_db"] is None
    assert "keep_fp32: none (of 5 blocks) meets sqnr_db >= 60.0 with no noise on" in capsys.readouterr().out


def test_a_budget_that_cannot_be_met_is_the_users_to_change(validation):
    damage = QUIET | {"e": 0.001}  # 60 dB with all others kept
    with pytest.raises(
        UserError, match=r"fake: sqnr_db >= 61.0 is not met with up to 4 of 5 .* best is 60.0 dB, with 4"
    ) as caught:
        chosen(damage, validation, sqnr_db=61.0)
    assert str(caught.value).count("\n") < 2
    with pytest.raises(UserError, match=r"accuracy_drop <= -0.1 is not met .* best is a drop of 0.0000, with 2\."):
        chosen(FLIPS, validation, accuracy_drop=-0.1)
    with pytest.raises(UserError, match=r"sqnr_db >= 5.0 and accuracy_drop <= -0.1 is not met .* no noise and a drop of 0.0000"):
        chosen(FLIPS, validation, sqnr_db=5.0, accuracy_drop=-0.1)


def test_as_many_validation_images_as_the_recipe_says(validation):
    log = choose(Fake(**FLIPS), validation, accuracy_drop=1.0, images=4)["sensitivity"]
    assert log["images"] == 4
    taken = validation.sample(4).index
    flipped = sum(number < 4 for number in taken)
    assert log["tried"][0]["agreement"] == 1 - flipped / 4


WITHOUT = [{}, {"images": 10}, {"sqnr_db": None}, {"sqnr": 20.0}]


@pytest.mark.parametrize("auto", [*WITHOUT, {"sqnr_db": 1, "psnr": 1}, {"sqnr_db": 1, "images": 0}])
def test_auto_without_a_budget_is_an_error_before_any_work(validation, auto):
    backend = Fake(**QUIET)
    with pytest.raises(ValueError, match=r"takes auto=dict\(\) of \['sqnr_db', 'accuracy_drop'\]"):
        choose(backend, validation, **auto)
    with pytest.raises(ValueError, match="takes auto"):
        sensitivity.choose_fp32_blocks(backend, Model(), CALIBRATION, validation, {"keep_fp32": "auto"})
    assert backend.calls == []


@pytest.mark.parametrize("recipe", [{"keep_fp32": ()}, {"keep_fp32": ("a", "d"), "auto": {"sqnr_db": 99}}, {"headroom": 4.0}])
def test_names_given_in_the_recipe_stay_and_cost_nothing(validation, recipe):
    backend, before = Fake(**QUIET), copy.deepcopy(recipe)
    chosen_recipe = sensitivity.choose_fp32_blocks(backend, Model(), CALIBRATION, validation, recipe)
    assert chosen_recipe is recipe and recipe == before
    assert backend.calls == []


def test_logits_that_are_not_finite_have_no_rank(validation):
    with pytest.raises(ValueError, match="not finite"):
        chosen(QUIET | {"b": math.inf}, validation, sqnr_db=20.0)


# ---- a real engine


class Unit(nn.Sequential):
    """A block of several layers."""


@pytest.fixture(scope="module")
def outlier():
    """Four blocks; between the layers of the second, one channel is a thousand times the others.

    It is divided away again, so the float network is an ordinary one, but the one scale of that tensor leaves the other channels
    no resolution. The outlier stays inside of the block: at its border it would damage the neighbour just as much.
    """
    torch.manual_seed(0)
    second = Unit(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    with torch.no_grad():
        second[0].weight[3] = 1000 * second[0].weight[3].abs()  # positive, so that it gets through ReLU
        second[2].weight[3] /= 1000
    first = Unit(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    third = Unit(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(first, second, third, nn.Linear(12, 2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # what is the same for all images would only hide the noise
            nn.init.zeros_(parameter)
    return model


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="this build of torch lacks fbgemm")
def test_fbgemm_keeps_the_block_with_the_outlier(tmp_path, outlier):
    generator = np.random.default_rng(0)
    contrast, level = generator.uniform(20, 200, (40, 1, 1, 3)), generator.uniform(0, 55, (40, 1, 1, 3))
    pixels = level + contrast * generator.random((40, 32, 32, 3))
    images = split_of(tmp_path, pixels.astype(np.uint8), np.arange(40) % 2)
    calibration, state = images.calibration(40), copy.deepcopy(outlier.state_dict())
    recipe = dict(bits=8, activations="minmax", bias_correction=False, keep_fp32="auto")
    recipe["auto"] = dict(images=40, calibration_images=40, sqnr_db=20.0)
    chosen_recipe = sensitivity.choose_fp32_blocks(registry.get("fbgemm"), outlier, calibration, images, recipe)
    log = chosen_recipe.pop("sensitivity")
    assert chosen_recipe["keep_fp32"] == ("1",) and log["order"][0] == "1"
    assert log["scan"]["1"] + 10 < min(log["scan"][name] for name in ("0", "2", "3"))
    assert log["tried"][0]["sqnr_db"] < 20 <= log["tried"][1]["sqnr_db"]
    assert all(torch.equal(value, state[name]) for name, value in outlier.state_dict().items())
    deployed = registry.get("fbgemm").quantize(outlier, calibration, chosen_recipe)
    assert deployed.facts["quantized"] == ["0.0", "2.0", "3"]
