"""State dicts in files as people have them: under any key and with any prefix.

Other objects may stand next to them. Nothing in a file is executed: torch's `weights_only`
unpickler reads it, with a few more types that only hold values.
"""

import argparse
import collections
import datetime
import pathlib
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, torch.Size]

# Parts of a parameter's name that DataParallel, torch.compile, FSDP and activation checkpointing
# insert, at any depth.
INSERTED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PREFERRED = ("state_dict", "model_state_dict", "model")  # where several keys hold the network
AVERAGED = "n_averaged"  # a counter of torch.optim.swa_utils.AveragedModel
DEPTH = 4  # of nested dictionaries
SAVE = "torch.save(model.state_dict(), FILE)"


def read(path: Path, shapes: Shapes) -> tuple[Tensors, str]:
    """Read the tensors at `path` that belong to a network whose tensors have these `shapes`.

    Searches nested dictionaries for the state dict that fits best, and removes the parts that
    wrappers insert into its names and the longest prefix in front of them. Returns the tensors, in
    FP32 if they are floating-point, and where they were, for example "state_dict, model.*". The
    tensors of other modules next to the network are left out. Raises `UserError` if the file cannot
    be read safely, or holds no state dict, unusable tensors, or several networks.
    """
    content = _loaded(path)
    candidates = [
        (place, tensors, _prefixes(tensors, shapes)) for place, tensors in _state_dicts(content)
    ]
    if not candidates:
        kind = "no named tensors" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"--init {path}: holds {kind}, not a state dict. Give a file of {SAVE}.")
    place, tensors, counts = max(candidates, key=lambda entry: max(entry[2].values(), default=0))
    most = max(counts.values(), default=0)
    largest = [prefix for prefix, count in counts.items() if count == most]
    if len(largest) > 1 and most > 1:
        raise UserError(
            f"--init {path}: holds several networks ({', '.join(largest)}). Give a file with the "
            "tensors of one."
        )
    prefix = largest[0] if largest else ""
    inside = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    return _checked(path, inside), ", ".join(filter(None, [*place, prefix and f"{prefix}*"]))


def _state_dicts(content, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """Yield the dictionaries in `content` that hold tensors, with the keys that lead to them."""
    if not isinstance(content, dict) or len(place) > DEPTH:
        return
    tensors = {
        ".".join(part for part in key.split(".") if part not in INSERTED): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor) and key != AVERAGED
    }
    if tensors:
        yield place, tensors
    inner = [key for key, value in content.items() if isinstance(value, dict)]
    for key in sorted(inner, key=lambda key: (key not in PREFERRED, inner.index(key))):
        yield from _state_dicts(content[key], (*place, str(key)))


def _prefixes(tensors: Tensors, shapes: Shapes) -> collections.Counter[str]:
    """Count the tensors that fit a network's `shapes`, by the prefix in front of their names."""
    counts: collections.Counter[str] = collections.Counter()
    for name, value in tensors.items():
        parts = name.split(".")
        for start in range(len(parts)):
            if shapes.get(".".join(parts[start:])) == value.shape:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    return counts


def _checked(path: Path, tensors: Tensors) -> Tensors:
    for name, value in tensors.items():
        if why := unusable(value):
            raise UserError(
                f"--init {path}: the tensor {name} {why}. Give a file with plain, finite weights."
            )
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
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


def _loaded(path: Path):
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on old and on other formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling an arbitrary file can raise anything
        raise UserError(f"--init {path}: {_reason(path, error)}") from None


def _harmless() -> list:
    """Types outside torch that only hold values, as found next to weights in checkpoints."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    paths = {
        "PosixPath": pathlib.PurePosixPath,  # the other system's kind cannot be made here
        "WindowsPath": pathlib.PureWindowsPath,
        "PurePosixPath": pathlib.PurePosixPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }
    return [
        argparse.Namespace,
        collections.defaultdict,
        datetime.date,
        datetime.datetime,
        datetime.timedelta,
        dict,
        np.dtype,
        np.ndarray,
        *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type)),
        *((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *(
            (multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct")
            for core in ("core", "_core")
        ),
        *(
            (kind, f"{module}.{name}")
            for module in ("pathlib", "pathlib._local")
            for name, kind in paths.items()
        ),
    ]


def _reason(path: Path, error: Exception) -> str:
    """Say why torch refused the file at `path`, and how to convert it."""
    named = re.search(r"GLOBAL (\S+)|[Uu]nsupported class (\S+)", str(error))
    if named:
        name = next(filter(None, named.groups()))
        return (
            f"not a state dict that torch can load safely: it needs {name}, whose code would run. "
            f"If you trust the file, torch.load it there with weights_only=False, then {SAVE}."
        )
    if kind := _other_format(path):
        return f"this is {kind}. Load it with the program that made it, then {SAVE}."
    return (
        f"not a state dict that torch can load safely ({type(error).__name__}; cut off or not "
        f"torch's?). Give a file of {SAVE}."
    )


def _other_format(path: Path) -> str | None:
    """Name the format of a file that holds weights in another way; None if it is unknown."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes"
    if re.match(rb"[\x00-\xff]{8}\{\s*\"", start):
        return "a safetensors file"
    if tarfile.is_tarfile(path):
        return "a tar file, torch's format before 0.1.10"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in name for name in names):
            return "a TorchScript file"
        if any(name.endswith(".npy") for name in names):
            return "a NumPy archive"
    return None
