"""The study's networks with a head of two classes."""

import functools

import torch
from torch import nn

from utils.catalog import MODELS

NUM_CLASSES = 2


@functools.cache
def torchvision_models():
    """Return `torchvision.models`, even if torchvision's compiled extension cannot be loaded.

    A torchvision built for CUDA cannot load its extension next to a CPU build of torch. Its import
    then fails when it registers fake versions of two detection operators, which the extension would
    have defined. Defining their schemas is enough, because the study detects no objects.
    """
    try:
        import torchvision.models as models
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # Deleting the library would remove the operators, so an attribute keeps it.
        torchvision_models.library = library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models as models
    return models


def build(name: str) -> nn.Module:
    """Build architecture `name` with random weights and a two-class head, in training mode.

    The model's attribute `architecture` is `name`. The parameter counts with this head are
    57,012,034 (alexnet), 11,177,538 (resnet18) and 1,519,906 (mobilenetv3).
    """
    model = getattr(torchvision_models(), MODELS[name].torchvision)(
        weights=None, num_classes=NUM_CLASSES
    )
    model.architecture = name  # stored in artifacts that hold only weights, for `rebuild`
    return model


def rebuild(content: dict) -> nn.Module:
    """Rebuild a network from {"architecture": name, "state_dict": weights}.

    It is in training mode and in FP32; weights in another precision are converted.
    """
    model = build(content["architecture"])
    model.load_state_dict(content["state_dict"])
    return model


def head(model: nn.Module, name: str) -> set[str]:
    """Return the names of the parameters in the last layer of `model`, of architecture `name`."""
    return {
        parameter
        for parameter, _ in model.named_parameters()
        if parameter.startswith(MODELS[name].head + ".")
    }
