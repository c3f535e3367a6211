"""Trained weights on disk.

There is one FP32 baseline per model and seed, and every quantized script starts from it.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from utils import cli, paths, progress
from utils.catalog import Run
from utils.cli import Options
from utils.data.splits import Data
from utils.errors import UserError
from utils.training import architectures

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and its provenance."""

    path: Path
    model: nn.Module  # FP32, in evaluation mode; with fake quantization after QAT
    sha256: str  # of the file
    # Keys: recipe, init, backend (QAT only), data, seed, device, history, best_epoch,
    # training_dtype, fingerprint, processes.
    training: dict


def path_of(run: Run, study: str, options: Options, tag: str = "") -> Path:
    """Return the path of the trained weights of `run`.

    A `tag` distinguishes QAT networks that were trained for different engines.
    """
    return options.checkpoints / study / f"{run.name}{'_' * bool(tag)}{tag}_seed{options.seed}.pt"


def fingerprint(**facts) -> str:
    """Return the sha256 of all `facts` that decide the outcome of a training.

    They are values for JSON; any other value is replaced by its `str`.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derived(path: Path, suffix: str, write: Callable[[Path], None]) -> Path:
    """Return the file that `write` makes of the checkpoint at `path`; make it if it is missing.

    It lies beside the checkpoint, and its name holds 8 digits of the checkpoint's hash, so other
    weights have another file. Processes that ask at once wait for the first.
    """
    target = path.with_name(f"{path.stem}.{sha256_of(path)[:8]}{suffix}")
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with paths.atomic(target) as temporary:
                write(temporary)
    return target


def packed(content: dict) -> memoryview:
    """Return the bytes that `torch.save` would write to a file.

    Its C++ writer ends the process, without a traceback, if the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def export(path: Path, model: nn.Module) -> None:
    """Write the weights of `model`, of an architecture of the catalog, without training facts."""
    facts = {"format": FORMAT, "architecture": model.architecture}
    path.write_bytes(packed({"state_dict": _weights(model), "json": json.dumps(facts)}))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def save(path: Path, architecture: str, model: nn.Module, data: Data, training: dict) -> None:
    """Write weights and training facts atomically.

    A file that was trained with other settings is never overwritten: it is renamed and gets the
    first 8 digits of its fingerprint.
    """
    facts = {"format": FORMAT, "architecture": architecture, "data": data.describe(), "training": training}
    with paths.atomic(path) as temporary:
        temporary.write_bytes(packed({"state_dict": _weights(model), "json": json.dumps(facts)}))
        if path.exists():
            _keep(path, training["fingerprint"])


def _keep(path: Path, fingerprint: str) -> None:
    """Rename the checkpoint at `path` if it is of another training than that of `fingerprint`."""
    try:
        old = read(path)["training"]["fingerprint"]
    except UserError:
        old = "unreadable"
    if old != fingerprint:
        kept = path.with_name(f"{path.stem}.{old[:8]}.pt")
        path.replace(kept)
        progress.say(f"checkpoint: the one made with other settings is kept as {kept.name}")


def read(path: Path) -> dict:
    """Return a checkpoint's "state_dict", "architecture", "data", "training" and "format".

    Raises `UserError` if the file cannot be read as a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {"state_dict": content["state_dict"], **json.loads(content["json"])}
    except Exception as error:  # unpickling a damaged file can raise anything
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it and train again.") from None


def load_baseline(run: Run, data: Data, options: Options) -> Checkpoint:
    """Load the FP32 baseline that `run` starts from, in evaluation mode.

    If it is missing, damaged or trained on other images, raises `UserError`, which says how to
    train it.
    """
    path = path_of(run.baseline, data.study, options)
    command = cli.command(run.baseline, options.replace(backends=run.baseline.backends[:1]))
    if not path.exists():
        raise UserError(f"no FP32 baseline at {path}. Make it first: {command}")
    content = read(path)
    if content["data"]["sha256"] != data.digest:
        raise UserError(f"the baseline at {path} was trained on other images. Train it on these: {command}")
    return Checkpoint(path, architectures.rebuild(content).eval(), sha256_of(path), content["training"])
