"""What the tests of engines that lower quantized networks share; each of their modules names its ENGINE."""

import pytest
from small_networks import images, mixed, quantized


@pytest.fixture(scope="module")
def model():
    return mixed()


@pytest.fixture(scope="module")
def integers(request, model):
    """`model`, quantized as the engine of the module asks."""
    return quantized(model, request.module.ENGINE.qdq_config({"bits": 8}), images())
