"""The recipes on other networks: ResNet-34 and MobileNetV2, trained for a minute."""

import copy
import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import bright_and_dark
from torch import nn

from utils import architectures
from utils.backends import registry
from utils.catalog import BACKENDS
from utils.metrics import sqnr_db
from utils.quantize import ptq, reconstruction
from utils.quantize.exact import execute
from utils.quantize.layers import weighted

RECIPES = {"resnet34": "resnet18", "mobilenet_v2": "mobilenetv3"}
SIDE, COUNT = 64, 160
# Rounds of 16 epochs at most: processors round differently, and one round was not always enough.
EPOCHS, ROUNDS = 16, 4
GOOD = 0.9  # accuracy
CONFIGS = {}  # configuration -> the first engine that asks for it
for engine, entry in BACKENDS.items():
    if ("ptq", "int8") in entry.serves and "cpu" in entry.devices:
        CONFIGS.setdefault(registry.get(engine).default_config(8), engine)
CASES = [pytest.param(config, id=name) for config, name in CONFIGS.items()]
# As without VNNI: one factor of a product has 7 bits.
CASES += [
    pytest.param(dataclasses.replace(config, overflow="all"), id=f"{name}, overflow")
    for config, name in CONFIGS.items()
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return bright_and_dark(tmp_path_factory.mktemp("data"), COUNT, SIDE)


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, data):
    """A network that classifies the images, the recipe of its relative, and validation images."""
    torch.manual_seed(0)
    model = getattr(architectures.torchvision_models(), request.param)(weights=None, num_classes=2)
    x, y = data.train.calibration(COUNT), torch.from_numpy(data.train.sample(COUNT).y)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    recipe = importlib.import_module(f"quantization.ptq.{RECIPES[request.param]}_ptq_int8").RECIPE
    shown = data.validation.calibration(COUNT)
    labels = torch.from_numpy(data.validation.sample(COUNT).y)
    for _ in range(ROUNDS):
        train(model, optimizer, x, y)
        if accuracy(model, shown, labels) > GOOD:
            break
    return model, recipe, shown, labels


def train(model, optimizer, x, y):
    """Train for EPOCHS, then give BatchNorm the statistics of the final weights."""
    norms = [module for module in model.train().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.1
    for _ in range(EPOCHS):
        for order in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(x[order]), y[order]).backward()
            optimizer.step()
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    model.eval()


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean()


@pytest.mark.slow
@pytest.mark.parametrize("config", CASES)
def test_int8_of_another_network_is_near_its_fp32(trained, data, config, monkeypatch):
    monkeypatch.setattr(reconstruction, "MOST_STEPS", 10)
    model, recipe, x, y = trained
    with torch.no_grad():
        expected = model(x)
    assert accuracy(model, x, y) > GOOD  # it has something to lose
    before = copy.deepcopy(model.state_dict())
    config = config.fixed(recipe.overflow_fix, recipe.portable)
    quantized = ptq(model, data.train.calibration(COUNT), recipe, config)
    assert len(quantized.layers) == len(weighted(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    answer = execute(quantized, x)
    assert sqnr_db(expected.numpy(), answer.numpy()) > 15
    assert (answer.argmax(1) == expected.argmax(1)).float().mean() >= 0.95
