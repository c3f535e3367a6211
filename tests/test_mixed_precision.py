"""What is deployed by measured latency: the blocks in FP32 of `formats="auto"`, and the engine of `--backend fastest`.

Most tests fake the measuring: quantizing a block adds a known noise, and keeping it in FP32 a known time, so that every
choice can be computed by hand.
"""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import split_of
from torch import nn

from utils.backends import registry
from utils.cli import Options
from utils.errors import UserError
from utils.timing import choice
from utils.timing.choice import Trial

CALIBRATION = torch.arange(100.0).view(100, 1, 1, 1).expand(100, 3, 4, 4)
NOISE = dict(
    a=0.01, b=0.002, c=0.03, d=0.0004
)  # of a quantized block, relative to the power of the logits
COST = dict(
    a=1.0, b=-0.5, c=2.0, d=0.5
)  # milliseconds that a block adds in FP32; all in INT8 takes 10
WHOLE = 10.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NOISE:
            self.add_module(name, nn.Linear(1, 1))


class Fake:
    """A backend that notes what it is asked for; `speed` divides the times."""

    def __init__(self, name="fake", speed=1.0, noise=0.0, config="one"):
        self.name, self.speed, self.noise, self.config, self.calls = name, speed, noise, config, []

    def quantize(self, model, images, recipe):
        assert "formats" not in recipe and "budget" not in recipe
        self.calls.append((recipe["keep_fp32"], len(images)))
        return SimpleNamespace(backend=self, keep=recipe["keep_fp32"])

    def qdq_config(self, recipe):
        return self.config

    def quantized(self, model, images, recipe):
        self.calls.append("quantized")
        return self.config

    def deploy(self, quantized):
        assert quantized == self.config
        return SimpleNamespace(backend=self, keep=())


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """Fake the measuring; returns the names of the networks of each comparison."""
    calls = []

    def compare(experiment, deployed, fp32):
        assert fp32 == "FP32"
        calls.append(list(deployed))
        trials = []
        for name, each in deployed.items():
            noise = (
                sum(value for block, value in NOISE.items() if block not in each.keep)
                + each.backend.noise
            )
            ms = (WHOLE + sum(COST[block] for block in each.keep)) / each.backend.speed
            trials.append(Trial(name, ms, -10 * np.log10(noise), round(noise, 9)))
        return trials

    monkeypatch.setattr(choice, "compare", compare)
    monkeypatch.setattr(choice, "fp32_logits", lambda experiment: "FP32")
    return calls


def experiment(**changes):
    options = Options(("fake",), threads=2, batch_sizes=(1, 8)).replace(**changes)
    return SimpleNamespace(
        options=options,
        baseline=SimpleNamespace(model=Model()),
        data=SimpleNamespace(validation="x" * 40),
    )


def chosen(backend, **budget):
    return choice.formats(
        experiment(), backend, CALIBRATION, dict(formats="auto", budget=budget, bits=8)
    )


# ---- formats


# Of the noise, c removes 0.03 for 2 ms, a 0.01 for 1 ms, d 0.0004 for 0.5 ms, and b, which is faster in FP32, 0.002 for nothing.
@pytest.mark.parametrize(
    ("limit", "keep"),
    [(0.0405, ("b",)), (0.0403, ("b", "c")), (0.0104, ("b", "c")), (0.01, ("a", "b", "c"))],
)
def test_blocks_that_are_faster_in_fp32_stay_so_and_then_those_that_remove_most_error_for_their_time(
    limit, keep, compared
):
    backend = Fake()
    recipe = chosen(backend, accuracy_drop=limit)
    assert recipe["keep_fp32"] == keep and recipe["bits"] == 8 and "formats" not in recipe
    assert compared[0] == [choice.WHOLLY, "a", "b", "c", "d"]
    assert all(
        names[0] == choice.WHOLLY and len(names) == 2 for names in compared[1:]
    )  # timed beside the former
    few, all_of_them = choice.FEW, len(CALIBRATION)
    assert [count for _, count in backend.calls] == [few] * 5 + [all_of_them] * (
        len(backend.calls) - 5
    )
    log = recipe["trials"]
    assert (log["budget"], log["threads"], log["batch_size"], log["images"]) == (
        {"accuracy_drop": limit},
        2,
        1,
        40,
    )
    assert [trial["name"] for trial in log["tried"]][:5] == compared[0]
    assert log["tried"][-1]["name"] == f"in FP32: {', '.join(keep)}"
    assert json.loads(json.dumps(log, allow_nan=False)) == log


def test_blocks_that_are_faster_in_fp32_may_return_to_int8_if_the_last_one_breaks_the_budget(
    monkeypatch,
):
    for block, cost in dict(a=-1.0, b=-1.0, c=2.0, d=-1.0).items():
        monkeypatch.setitem(COST, block, cost)
    log = chosen(Fake(), accuracy_drop=0.02)["trials"]["tried"]
    names = [
        trial["name"].removeprefix("in FP32: ")
        for trial in log
        if trial["name"].startswith("in FP32")
    ]
    assert names == [
        "a, b, d",
        "nothing",
        "a",
        "a, c",
    ]  # what costs less than 2 % costs 0.2 ms; c costs 2 ms, and removes most


def test_both_kinds_of_budget_must_be_met():
    assert chosen(Fake(), sqnr_db=19.0)["keep_fp32"] == ("b", "c")  # noise 0.0104 is 19.8 dB
    assert chosen(Fake(), sqnr_db=19.0, accuracy_drop=0.01)["keep_fp32"] == ("a", "b", "c")


def test_a_budget_that_cannot_be_met_is_the_users_to_change():
    with pytest.raises(
        UserError,
        match=r'^formats="auto" on fake: sqnr_db >= 60 is not met with all blocks but one',
    ) as caught:
        chosen(Fake(), sqnr_db=60)
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize("budget", [{}, {"sqnr_db": None}, {"psnr": 1}])
def test_a_budget_without_a_known_limit_is_an_error_before_any_work(budget):
    backend = Fake()
    with pytest.raises(ValueError, match="give numbers for one or both of sqnr_db, accuracy_drop"):
        chosen(backend, **budget)
    assert backend.calls == []


def test_without_a_budget_three_thousandths_may_be_lost():
    assert choice.budget_of({}) == {"accuracy_drop": 0.003}


def test_a_recipe_with_other_formats_is_an_error_and_one_without_stays():
    recipe = {"keep_fp32": ("a",)}
    assert choice.formats(experiment(), Fake(), CALIBRATION, recipe) is recipe
    with pytest.raises(ValueError, match="formats='int8' in the recipe: give 'auto'"):
        choice.formats(experiment(), Fake(), CALIBRATION, {"formats": "int8"})


# ---- engines


@pytest.fixture
def engines(monkeypatch):
    """Three engines that can run here; the fastest is over the budget."""
    able = [Fake("slow"), Fake("quick", 2.0), Fake("wrong", 3.0, noise=0.5, config="another")]
    monkeypatch.setattr(registry, "select", lambda options: iter(able))
    return able


def test_the_fastest_engine_within_the_budget_is_the_only_plan(engines, capsys):
    recipe = dict(bits=8, budget=dict(accuracy_drop=0.1))
    ((backend, plan),) = choice.plans(experiment(fastest=True), CALIBRATION, recipe)
    assert backend.name == "quick"
    assert [trial["name"] for trial in plan.pop("engines")["tried"]] == ["slow", "quick", "wrong"]
    assert plan == recipe
    assert [each.calls for each in engines] == [
        ["quantized"],
        [],
        ["quantized"],
    ]  # engines that round alike share a network
    said = capsys.readouterr().out
    assert "wrong: 3.33 ms, 2.7 dB, +54.24 points lost, which is over the budget" in said
    assert "fastest within accuracy_drop <= 0.1: quick" in said


def test_without_the_option_every_engine_has_a_plan(engines):
    plans = list(choice.plans(experiment(), CALIBRATION, recipe := dict(bits=8)))
    assert plans == [(each, recipe) for each in engines] and all(
        each.calls == [] for each in engines
    )


def test_engines_that_are_all_over_the_budget_are_an_error(engines):
    with pytest.raises(
        UserError,
        match=r"^--backend fastest: no engine is within the budget, accuracy_drop <= 0.003",
    ):
        list(choice.plans(experiment(fastest=True), CALIBRATION, dict(bits=8)))


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
        second[0].weight[3] = (
            1000 * second[0].weight[3].abs()
        )  # positive, so that it gets through ReLU
        second[2].weight[3] /= 1000
    first = Unit(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    third = Unit(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(first, second, third, nn.Linear(12, 2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # what is the same for all images would only hide the noise
            nn.init.zeros_(parameter)
    return model


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="this build of torch lacks fbgemm",
)
def test_fbgemm_keeps_the_block_with_the_outlier(tmp_path, outlier, monkeypatch):
    monkeypatch.undo()  # measures
    generator = np.random.default_rng(0)
    contrast, level = (
        generator.uniform(20, 200, (40, 1, 1, 3)),
        generator.uniform(0, 55, (40, 1, 1, 3)),
    )
    pixels = level + contrast * generator.random((40, 224, 224, 3))
    images = split_of(tmp_path, pixels.astype(np.uint8), np.arange(40) % 2)
    state = copy.deepcopy(outlier.state_dict())
    recipe = dict(
        bits=8,
        activations="minmax",
        bias_correction=False,
        formats="auto",
        budget=dict(sqnr_db=20.0),
    )
    case = experiment(smoke=True, threads=1)
    case.baseline.model, case.data.validation = outlier, images
    backend, calibration = registry.get("fbgemm"), images.calibration(40)
    chosen = choice.formats(case, backend, calibration, recipe)
    assert "1" in chosen["keep_fp32"]
    tried = {trial["name"]: trial["sqnr_db"] for trial in chosen["trials"]["tried"]}
    assert tried["1"] > max(tried[name] for name in (choice.WHOLLY, "0", "2", "3")) + 6
    assert tried[choice.WHOLLY] < 20 <= chosen["trials"]["tried"][-1]["sqnr_db"]
    assert all(torch.equal(value, state[name]) for name, value in outlier.state_dict().items())
    deployed = backend.quantize(outlier, calibration, chosen)
    assert not [name for name in deployed.facts["quantized"] if name.startswith("1.")]
