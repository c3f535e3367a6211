"""Choices by measured latency: `formats="auto"` of a recipe, and `--backend fastest`.

Most tests fake the measuring: quantizing a block adds a known noise, and keeping it in FP32 a known
time, so that every choice can be computed by hand.
"""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import split_of
from torch import nn

from utils import engines, mixed_precision
from utils.backends import registry
from utils.cli import Options
from utils.errors import UserError
from utils.mixed_precision import Trial
from utils.quantize import ptq
from utils.recipes import Budget, Int8, RecipeError

CALIBRATION = torch.arange(100.0).view(100, 1, 1, 1).expand(100, 3, 4, 4)
RECIPE = Int8(ranges="minmax", calibration_images=100)
# Noise of a quantized block, relative to the power of the logits.
NOISE = dict(a=0.01, b=0.002, c=0.03, d=0.0004)
COST = dict(a=1.0, b=-0.5, c=2.0, d=0.5)  # milliseconds that a block adds in FP32
WHOLE = 10.0  # milliseconds with all blocks in INT8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NOISE:
            self.add_module(name, nn.Linear(1, 1))


class Fake:
    """A backend; `speed` divides the times, and `noise` adds to the noise."""

    def __init__(self, name="fake", speed=1.0, noise=0.0, config="one"):
        self.name, self.speed, self.noise, self.config = name, speed, noise, config

    def qdq_config(self, recipe):
        return self.config

    def deploy(self, quantized):
        assert quantized.config == self.config
        return SimpleNamespace(backend=self, keep=quantized.keep)


@pytest.fixture(autouse=True)
def quantized(monkeypatch):
    """Fake PTQ; returns the recipe, the number of images and the configuration of each call."""
    calls = []

    def fake(model, images, recipe, config):
        calls.append((recipe, len(images), config))
        return SimpleNamespace(config=config, keep=recipe.keep_fp32)

    monkeypatch.setattr(mixed_precision, "ptq", fake)
    return calls


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """Fake the measuring; returns the names of the networks of each comparison."""
    calls = []

    def compare(experiment, deployed, fp32):
        assert fp32 == "FP32"
        calls.append(list(deployed))
        trials = []
        for name, network in deployed.items():
            noise = sum(value for block, value in NOISE.items() if block not in network.keep)
            noise += network.backend.noise
            ms = WHOLE + sum(COST[block] for block in network.keep)
            ms /= network.backend.speed
            trials.append(Trial(name, ms, -10 * np.log10(noise), round(noise, 9)))
        return trials

    monkeypatch.setattr(mixed_precision, "compare", compare)
    monkeypatch.setattr(mixed_precision, "fp32_logits", lambda experiment: "FP32")
    return calls


def experiment(**changes):
    options = Options(("fake",), threads=2, batch_sizes=(1, 8)).replace(**changes)
    return SimpleNamespace(
        options=options,
        baseline=SimpleNamespace(model=Model()),
        data=SimpleNamespace(
            train=SimpleNamespace(calibration=lambda count: CALIBRATION[:count]),
            validation="x" * 40,
        ),
    )


def chosen(backend, **budget):
    recipe = RECIPE.replace(formats="auto", budget=Budget(**budget))
    return mixed_precision.choose_formats(experiment(), backend, recipe)


# ---- formats


# Of the noise, c removes 0.03 for 2 ms, a 0.01 for 1 ms, d 0.0004 for 0.5 ms. b is faster in FP32,
# and removes 0.002 at no cost.
@pytest.mark.parametrize(
    ("limit", "keep"),
    [(0.0405, ("b",)), (0.0403, ("b", "c")), (0.0104, ("b", "c")), (0.01, ("a", "b", "c"))],
)
def test_faster_blocks_stay_in_fp32_and_then_blocks_by_the_error_that_they_remove_for_their_time(
    limit, keep, compared, quantized
):
    recipe = chosen(Fake(), accuracy_drop=limit)
    given = RECIPE.replace(budget=Budget(accuracy_drop=limit))
    assert recipe.replace(trials=None) == given.replace(keep_fp32=keep)
    assert compared[0] == [mixed_precision.WHOLLY, "a", "b", "c", "d"]
    # All others are timed next to the network that is all in INT8.
    assert all(names[0] == mixed_precision.WHOLLY and len(names) == 2 for names in compared[1:])
    few, later = [mixed_precision.FEW] * 5, [len(CALIBRATION)] * (len(quantized) - 5)
    assert [count for _, count, _ in quantized] == few + later
    assert {made.formats for made, _, _ in quantized} == {"given"}
    log = recipe.trials
    assert log["budget"] == {"accuracy_drop": limit, "sqnr_db": None}
    assert (log["threads"], log["batch_size"], log["images"]) == (2, 1, 40)
    assert [trial["name"] for trial in log["tried"]][:5] == compared[0]
    assert log["tried"][-1]["name"] == f"in FP32: {', '.join(keep)}"
    assert json.loads(json.dumps(log, allow_nan=False)) == log


def test_blocks_that_are_faster_in_fp32_may_return_to_int8_if_the_last_one_breaks_the_budget(
    monkeypatch,
):
    for block, cost in dict(a=-1.0, b=-1.0, c=2.0, d=-1.0).items():
        monkeypatch.setitem(COST, block, cost)
    log = chosen(Fake(), accuracy_drop=0.02).trials["tried"]
    names = [
        trial["name"].removeprefix("in FP32: ")
        for trial in log
        if trial["name"].startswith("in FP32")
    ]
    # Blocks that cost less than 2 % count as 0.2 ms; c costs 2 ms, and removes most.
    assert names == ["a, b, d", "nothing", "a", "a, c"]


def test_both_kinds_of_budget_must_be_met():
    assert chosen(Fake(), sqnr_db=19.0).keep_fp32 == ("b", "c")  # noise 0.0104 is 19.8 dB
    assert chosen(Fake(), sqnr_db=19.0, accuracy_drop=0.01).keep_fp32 == ("a", "b", "c")


def test_a_budget_that_cannot_be_met_is_the_users_to_change():
    with pytest.raises(
        UserError,
        match=r'^formats="auto" on fake: sqnr_db >= 60 is not met with all blocks except one',
    ) as caught:
        chosen(Fake(), sqnr_db=60)
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize("budget", [{}, {"sqnr_db": None}, {"psnr": 1}])
def test_a_budget_without_a_known_limit_is_an_error_before_any_work(budget, quantized):
    with pytest.raises(RecipeError, match=r"^Budget.*accuracy_drop.*sqnr_db"):
        chosen(Fake(), **budget)
    assert quantized == []


def test_without_a_budget_three_thousandths_may_be_lost():
    assert RECIPE.budget == Budget(accuracy_drop=0.003)


def test_a_recipe_with_other_formats_is_an_error():
    with pytest.raises(RecipeError, match="formats='int8': give 'given' or 'auto'"):
        RECIPE.replace(formats="int8")


# ---- engines


@pytest.fixture
def able(monkeypatch):
    """Three engines that can run here; the fastest is over the budget."""
    able = [Fake("slow"), Fake("quick", 2.0), Fake("wrong", 3.0, noise=0.5, config="another")]
    monkeypatch.setattr(registry, "select", lambda options: iter(able))
    return able


def test_the_fastest_engine_within_the_budget_is_the_only_one(able, quantized, capsys):
    recipe = RECIPE.replace(budget=Budget(accuracy_drop=0.1))
    ((backend, chosen),) = engines.select(experiment(fastest=True), recipe)
    assert backend is able[1]
    assert [trial["name"] for trial in chosen.engines["tried"]] == ["slow", "quick", "wrong"]
    assert chosen.replace(engines=None) == recipe
    # Engines that round alike share a network.
    assert [config for _, _, config in quantized] == ["one", "another"]
    said = capsys.readouterr().out
    assert "wrong: 3.33 ms, 2.7 dB, +54.24 points lost, which is over the budget" in said
    assert "fastest within accuracy_drop <= 0.1: quick" in said


def test_the_fastest_engine_also_chooses_formats(able):
    recipe = RECIPE.replace(formats="auto", budget=Budget(accuracy_drop=0.0425))
    ((backend, chosen),) = engines.select(experiment(fastest=True), recipe)
    assert backend is able[1] and chosen.keep_fp32 == ("b",)
    assert chosen.engines["tried"] and chosen.trials["tried"]


def test_without_the_option_every_engine_has_the_given_recipe(able, quantized):
    recipe = RECIPE.replace(keep_fp32=("a",))
    selected = list(engines.select(experiment(), recipe))
    assert selected == [(backend, recipe) for backend in able]
    assert all(chosen is recipe for _, chosen in selected) and quantized == []


def test_engines_that_are_all_over_the_budget_are_an_error(able):
    with pytest.raises(
        UserError,
        match=r"^--backend fastest: no engine is within the budget, accuracy_drop <= 0.003",
    ):
        list(engines.select(experiment(fastest=True), RECIPE))


# ---- a real engine


class Unit(nn.Sequential):
    """A block of several layers."""


@pytest.fixture(scope="module")
def outlier():
    """Four blocks; between the layers of the second, one channel is a thousand times the others.

    It is divided away again, so the float network is an ordinary one, but the one scale of that
    tensor leaves the other channels no resolution. The outlier stays inside the block: at its
    border it would damage the neighbour just as much.
    """
    torch.manual_seed(0)
    second = Unit(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    with torch.no_grad():
        # Positive, so that it passes ReLU.
        second[0].weight[3] = 1000 * second[0].weight[3].abs()
        second[2].weight[3] /= 1000
    first = Unit(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    third = Unit(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(first, second, third, nn.Linear(12, 2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # a part that all images share would only hide the noise
            nn.init.zeros_(parameter)
    return model


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="this build of torch lacks fbgemm",
)
def test_fbgemm_keeps_the_block_with_the_outlier(tmp_path, outlier, monkeypatch):
    monkeypatch.undo()  # measures
    generator = np.random.default_rng(0)
    contrast = generator.uniform(20, 200, (40, 1, 1, 3))
    level = generator.uniform(0, 55, (40, 1, 1, 3))
    pixels = level + contrast * generator.random((40, 224, 224, 3))
    images = split_of(tmp_path, pixels.astype(np.uint8), np.arange(40) % 2)
    state = copy.deepcopy(outlier.state_dict())
    recipe = RECIPE.replace(calibration_images=40, formats="auto", budget=Budget(sqnr_db=20.0))
    case = experiment(smoke=True, threads=1)
    case.baseline.model, case.data.train, case.data.validation = outlier, images, images
    backend = registry.get("fbgemm")
    chosen = mixed_precision.choose_formats(case, backend, recipe)
    assert "1" in chosen.keep_fp32
    tried = {trial["name"]: trial["sqnr_db"] for trial in chosen.trials["tried"]}
    others = (mixed_precision.WHOLLY, "0", "2", "3")
    assert tried["1"] > max(tried[name] for name in others) + 6
    assert tried[mixed_precision.WHOLLY] < 20 <= chosen.trials["tried"][-1]["sqnr_db"]
    assert all(torch.equal(value, state[name]) for name, value in outlier.state_dict().items())
    quantized = ptq(outlier, images.calibration(40), chosen, backend.qdq_config(chosen))
    deployed = backend.deploy(quantized)
    assert not [name for name in deployed.facts["quantized"] if name.startswith("1.")]
