"""The weights that training starts from: random, ImageNet's or a user's file."""

import http.client
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import architectures, cli, progress
from utils.catalog import MODELS
from utils.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model")  # usual keys of training checkpoints


@dataclass(frozen=True)
class Start:
    """A network at the start of its training."""

    model: nn.Module
    pretrained: frozenset[str]  # names of the loaded parameters; the others are random
    digest: str  # identifies the initial weights, see `cli.init_digest`


def initialize(name: str, init: str, seed: int) -> Start:
    """Build architecture `name` with weights from `init`: "scratch", "imagenet" or a file.

    The file holds a state dict. Tensors that fit by name and shape are loaded. The rest keep the
    values drawn from `seed`, and their names are printed. Raises `UserError` if the weights cannot
    be downloaded or read, or if no parameter fits.
    """
    torch.manual_seed(seed)
    model = architectures.build(name)
    if init == "scratch":
        return Start(model, frozenset(), "scratch")
    source = _imagenet(name) if init == "imagenet" else _read(Path(init))
    current = model.state_dict()
    fits = {
        key: value
        for key, value in source.items()
        if key in current and current[key].shape == value.shape
    }
    loaded = frozenset(key for key, _ in model.named_parameters() if key in fits)
    if not loaded:
        raise UserError(
            f"--init {init}: none of its {len(source)} tensors fits {name}; is the file from "
            "another architecture?"
        )
    model.load_state_dict(fits, strict=False)
    _report(init, current, source, fits)
    return Start(model, loaded, cli.init_digest(init))


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


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Read the state dict in `path`: plain, or under a usual key of a training checkpoint.

    The prefix "module." of DataParallel is removed, and floating-point tensors become FP32.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling an arbitrary file can raise anything
        raise UserError(
            f"--init {path}: not a state dict that torch can load safely ({type(error).__name__}). "
            "Give a file saved with torch.save(model.state_dict(), FILE)."
        ) from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(
            f"--init {path}: holds a {type(content).__name__}, not a state dict. Give a file saved "
            "with torch.save(model.state_dict(), FILE)."
        )
    tensors = {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    for key, value in tensors.items():
        if why := unusable(value):
            raise UserError(
                f"--init {path}: the tensor {key} {why}. Give a file with plain, finite weights."
            )
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }


def unusable(tensor: torch.Tensor) -> str | None:
    """Return why a tensor cannot be a network's weights, in a few words; None if it can."""
    if tensor.is_meta:
        return "has a shape but no values (it is on torch's meta device)"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.is_complex():
        return "is complex"
    if tensor.layout is not torch.strided:
        return "is sparse"
    if not (finite := torch.isfinite(tensor)).all():
        return f"has {int((~finite).sum())} values that are infinite or NaN"
    return None


def _report(init: str, current: dict, source: dict, fits: dict) -> None:
    missing = [
        key for key in current if key not in fits and not key.endswith("num_batches_tracked")
    ]
    unused = [key for key in source if key not in fits]
    progress.say(f"init: {len(fits)} of {len(current)} tensors from {Path(init).name}")
    if missing:
        progress.say(f"init: drawn at random: {', '.join(missing)}")
    if unused:
        progress.say(
            f"init: in the file but not used (unknown name or another shape): {', '.join(unused)}"
        )
