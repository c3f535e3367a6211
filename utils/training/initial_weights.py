"""The weights that training starts from: random, ImageNet's or a user's file."""

import functools
import http.client
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import architectures, cli, progress
from utils.catalog import MODELS
from utils.errors import UserError
from utils.training import weight_files
from utils.training.weight_files import Shapes, Tensors

NAMED = 3  # tensors that a message names
COUNTER = "num_batches_tracked"  # of BatchNorm; torch before 0.4.1 had none
# Families of torchvision that a refused file is compared with.
FAMILIES = "alexnet|efficientnet_b0|mobilenet|resnet|resnext|shufflenet|squeezenet|vgg|wide_resnet"


@dataclass(frozen=True)
class Start:
    """A network at the start of its training."""

    model: nn.Module
    pretrained: frozenset[str]  # names of the loaded parameters; the others are random
    digest: str  # identifies the initial weights, see `cli.init_digest`


def initialize(name: str, init: str, seed: int, partial: bool = False) -> Start:
    """Build architecture `name` with weights from `init`: "scratch", "imagenet" or a file.

    See `weight_files.read` for the files that it takes. Every tensor must fit by name and shape,
    except in the classifier. There, tensors that do not fit keep the values drawn from `seed`, and
    their names are printed. With `partial`, all others may be missing as well. Raises `UserError`
    if the weights cannot be downloaded or read, or if tensors are missing or left over.
    """
    torch.manual_seed(seed)
    model = architectures.build(name)
    if init == "scratch":
        return Start(model, frozenset(), "scratch")
    current = model.state_dict()
    if init == "imagenet":
        source, place = _imagenet(name), ""
    else:
        shapes = {key: value.shape for key, value in current.items()}
        source, place = weight_files.read(Path(init), shapes)
    fits = {
        key: value
        for key, value in source.items()
        if key in current and current[key].shape == value.shape
    }
    loaded = frozenset(key for key, _ in model.named_parameters() if key in fits)
    missing = [key for key in current if key not in fits and not key.endswith(COUNTER)]
    unused = [key for key in source if key not in fits]
    if not loaded or not partial:
        fit = f"{len(fits)} of the {len(current)} tensors of {name}"
        _check_whole(name, init, source, fit, missing, unused)
    model.load_state_dict(fits, strict=False)
    where = f"{Path(init).name} ({place})" if place else Path(init).name
    progress.say(f"init: {len(fits)} of {len(current)} tensors from {where}")
    if missing:
        progress.say(f"init: drawn at random: {', '.join(missing)}")
    if unused:
        progress.say(
            f"init: in the file but not used (unknown name or another shape): {', '.join(unused)}"
        )
    return Start(model, loaded, cli.init_digest(init))


def _check_whole(
    name: str, init: str, source: Tensors, fit: str, missing: list[str], unused: list[str]
) -> None:
    """Raise `UserError` if tensors outside the classifier are `missing` or `unused`."""
    classifier = MODELS[name].head.partition(".")[0] + "."
    lacking = [key for key in missing if not key.startswith(classifier)]
    extra = [key for key in unused if not key.startswith(classifier)]
    if not lacking and not extra:
        return
    looks = closest({key: value.shape for key, value in source.items()})
    other = (
        f"; the file looks like {looks}" if looks not in (None, MODELS[name].torchvision) else ""
    )
    sides = [f"missing: {_first(lacking)}"] if lacking else []
    sides += [f"not used: {_first(extra)}"] if extra else []
    raise UserError(
        f"--init {init}: only {fit} fit{other} "
        f"({'; '.join(sides)}). Give weights of {name}, or add --init-partial to draw the rest at "
        "random."
    )


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def closest(shapes: Shapes) -> str | None:
    """Return the network of torchvision that has most of these tensors; None if none has half."""
    given, best = set(shapes.items()), (0.5, None)
    for name, tensors in _relatives().items():
        shared = len(tensors & given) / len(tensors | given)
        best = max(best, (shared, name), key=lambda entry: entry[0])
    return best[1]


@functools.cache
def _relatives() -> dict[str, set[tuple[str, torch.Size]]]:
    """Return the names and shapes of the tensors of torchvision's networks in `FAMILIES`."""
    models, relatives = architectures.torchvision_models(), {}
    for name in models.list_models(module=models):
        if re.match(FAMILIES, name):
            with torch.device("meta"):
                network = getattr(models, name)(weights=None)
            relatives[name] = {(key, value.shape) for key, value in network.state_dict().items()}
    return relatives


def silence_branches(model: nn.Module) -> None:
    """Set the last BatchNorm gain of each residual branch of a MobileNetV3 to 0, in place.

    The network then starts with its shortcuts only, and learns from the first steps (Goyal et al.
    2017, arXiv:1706.02677, section 5.1).
    """
    for module in model.modules():
        if getattr(module, "use_res_connect", False):
            nn.init.zeros_(module.block[-1][1].weight)


def _imagenet(name: str) -> dict[str, torch.Tensor]:
    models = architectures.torchvision_models()
    weights = models.get_model_weights(MODELS[name].torchvision)["DEFAULT"]
    try:
        return weights.get_state_dict(progress=False)
    except (OSError, http.client.HTTPException) as error:  # urllib raises subclasses of OSError
        raise UserError(
            f"--init imagenet: torchvision could not download the {name} weights ({error}). "
            "Without internet access, give a state-dict file with --init FILE, or start from "
            "random weights with --init scratch."
        ) from None
