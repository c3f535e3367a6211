"""The three networks of the study, with a two-class head, and the loading of the weights that their training starts from."""

import functools
import hashlib
import http.client
from pathlib import Path

import torch
from torch import nn

from utils import progress
from utils.errors import UserError

NAMES = {"alexnet": "alexnet", "resnet18": "resnet18", "mobilenetv3": "mobilenet_v3_small"}  # ours -> torchvision's
HEADS = {"alexnet": "classifier.6", "resnet18": "fc", "mobilenetv3": "classifier.3"}
NUM_CLASSES = 2


@functools.cache
def torchvision_models():
    """`torchvision.models`, also beside a CPU build of torch whose torchvision was built for CUDA.

    There the compiled extension cannot load, and torchvision fails on registering the fake versions of two detection
    operators that it would have defined. Defining their schemas is enough: nothing here detects anything.
    """
    try:
        import torchvision.models as models
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        torchvision_models.library = library = torch.library.Library("torchvision", "DEF")  # lives as long as its operators
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models as models
    return models


def build(name: str) -> nn.Module:
    """Architecture `name` with freshly drawn weights and a two-class head, in training mode; its `architecture` is `name`.

    The parameter counts with this head are 57,012,034 (alexnet), 11,177,538 (resnet18) and 1,519,906 (mobilenetv3).
    """
    model = getattr(torchvision_models(), NAMES[name])(weights=None, num_classes=NUM_CLASSES)
    model.architecture = name  # artifacts that are weights alone say by it what they belong to
    return model


def initialize(name: str, init: str, seed: int) -> tuple[nn.Module, set[str], str]:
    """Architecture `name` started from `init`: "scratch", "imagenet" or a state-dict file.

    What fits by name and shape is loaded, the rest is said and drawn from `seed`. Returns the model, the names of the
    parameters that `init` provided, and a digest that identifies `init`. Raises `UserError` where weights cannot be had or
    nothing fits.
    """
    torch.manual_seed(seed)
    model = build(name)
    if init == "scratch":
        return model, set(), "scratch"
    if init == "imagenet":
        source, digest = _imagenet(name), "imagenet"
    else:
        source, digest = _read(Path(init)), hashlib.sha256(Path(init).read_bytes()).hexdigest()
    own = model.state_dict()
    fits = {key: value for key, value in source.items() if key in own and own[key].shape == value.shape}
    loaded = {key for key, _ in model.named_parameters() if key in fits}
    if not loaded:
        raise UserError(f"--init {init}: none of its {len(source)} tensors fits {name}; is it another architecture's file?")
    model.load_state_dict(fits, strict=False)
    _report(init, own, source, fits)
    return model, loaded, digest


def _imagenet(name: str) -> dict[str, torch.Tensor]:
    models = torchvision_models()
    try:
        return models.get_model_weights(NAMES[name])["DEFAULT"].get_state_dict(progress=False)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise UserError(
            f"--init imagenet: torchvision could not download the {name} weights ({error}). Without a network, give a "
            "state-dict file with --init FILE, or start from nothing with --init scratch."
        ) from None


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`: plain, or under the usual keys of a training checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a file that is none raises nearly anything
        raise UserError(f"--init {path}: not a state dict that torch can load safely ({type(error).__name__}).") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"--init {path}: holds a {type(content).__name__}, not a state dict.")
    tensors = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _report(init: str, own: dict, source: dict, fits: dict) -> None:
    missing = [key for key in own if key not in fits and not key.endswith("num_batches_tracked")]
    unused = [key for key in source if key not in fits]
    progress.say(f"init: {len(fits)} of {len(own)} tensors from {Path(init).name}")
    if missing:
        progress.say(f"init: drawn at random: {', '.join(missing)}")
    if unused:
        progress.say(f"init: in the file but not used (no such name or another shape): {', '.join(unused)}")


def is_head(name: str, parameter: str) -> bool:
    """Whether `parameter` belongs to the last layer of architecture `name`."""
    return parameter.startswith(HEADS[name] + ".")
