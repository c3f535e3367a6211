"""A network, and the same quantized for the ENGINE of the test module."""

import pytest
from small_networks import RECIPE, images, mixed, quantized


@pytest.fixture(scope="module")
def model():
    return mixed()


@pytest.fixture(scope="module")
def integers(request, model):
    """`model`, quantized as the engine of the module asks."""
    return quantized(model, request.module.ENGINE.qdq_config(RECIPE), images())
