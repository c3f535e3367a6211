"""The three networks with a head of two classes."""

import pytest
import torch

from utils import architectures
from utils.catalog import MODELS

PARAMETERS = {"alexnet": 57_012_034, "resnet18": 11_177_538, "mobilenetv3": 1_519_906}
HEAD = {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_networks_have_two_classes_and_the_published_number_of_parameters(name):
    with torch.device("meta"):  # shapes only: drawing weights takes time
        model = architectures.build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    names = [key for key, _ in model.named_parameters()]
    last = {f"{MODELS[name].head}.weight", f"{MODELS[name].head}.bias"}
    assert architectures.head(model, name) == set(names[-2:]) == last
    assert len(model.get_parameter(names[-2])) == 2
    assert model.training and model.architecture == name


def test_the_head_is_not_every_layer_with_the_same_prefix():
    model = torch.nn.Module()
    model.classifier = torch.nn.ModuleDict(
        {"3": torch.nn.Linear(1, 1), "30": torch.nn.Linear(1, 1)}
    )
    assert architectures.head(model, "mobilenetv3") == HEAD
