"""Trained weights on disk.

There is one FP32 baseline per model and seed, and every quantized script starts from it.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from utils import architectures, checksums, cli, environment, paths, progress, torch_file
from utils.catalog import Run
from utils.cli import Options
from utils.data.dataset import Data
from utils.errors import UserError
from utils.training import weight_files

FORMAT = 2  # since 2 with a digest of the content


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and its provenance."""

    path: Path
    model: nn.Module  # FP32, in evaluation mode; with fake quantization after QAT
    sha256: str  # of the file
    # Keys: recipe, init, code_sha256, versions, data, seed, device, history, best_epoch,
    # training_dtype, fingerprint, processes, threads (of each process); for QAT also backend and
    # quantization.
    training: dict


def path_of(run: Run, study: str, options: Options, tag: str = "") -> Path:
    """Return the path of the trained weights of `run`.

    A `tag` distinguishes QAT networks that were trained for different engines.
    """
    name = f"{run.name}_{tag}" if tag else run.name
    return options.checkpoints / study / f"{name}_seed{options.seed}.pt"


def fingerprint(**facts) -> str:
    """Return the SHA-256 of `facts`, everything that decides a result.

    They are values for JSON; any other value is replaced by its `str`.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def derived(
    path: Path,
    suffix: str,
    write: Callable[[Path], None],
    code: tuple[str, ...],
    packages: tuple[str, ...],
) -> Path:
    """Return the file that `write` makes of the checkpoint at `path`; make it if it is missing.

    Its name holds 8 digits of everything that decides it: the checkpoint's hash, the modules `code`
    with all that they import, and the versions of the `packages` that write it. Its hash is stored
    next to it: if the file has changed since, it is made again. Processes that ask at once wait for
    the first.
    """
    key = fingerprint(
        checkpoint=checksums.sha256_of(path),
        code=environment.code_of(*code),
        versions={package: _version(package) for package in packages},
    )
    target = path.with_name(f"{path.stem}.{key[:8]}{suffix}")
    noted = target.with_name(f"{target.name}.sha256")
    with FileLock(f"{target}.lock"):
        if target.exists() and checksums.read(noted) == checksums.sha256_of(target).encode():
            return target
        if target.exists():
            progress.say(f"cache: {target} is not what was written there, and is made again")
        with paths.atomic(target) as temporary:
            write(temporary)
        checksums.write(noted, checksums.sha256_of(target).encode())
    return target


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def export(path: Path, model: nn.Module) -> None:
    """Write the weights of `model`, of an architecture of the catalog, without training facts."""
    path.write_bytes(_content(model, {"architecture": model.architecture}))


def _content(model: nn.Module, facts: dict) -> memoryview:
    """Return the bytes of a checkpoint: weights, facts and the digest of both."""
    weights, text = _weights(model), json.dumps({"format": FORMAT, **facts})
    content = {"state_dict": weights, "json": text, "sha256": _digest(weights, text)}
    return torch_file.packed(content)


def _digest(weights: dict[str, torch.Tensor], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name, value in weights.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def save(path: Path, architecture: str, model: nn.Module, data: Data, training: dict) -> None:
    """Write weights and training facts atomically.

    A file with other settings is never overwritten: its name gets the first 8 digits of its
    fingerprint.
    """
    facts = {"architecture": architecture, "data": data.describe(), "training": training}
    with paths.atomic(path) as temporary:
        temporary.write_bytes(_content(model, facts))
        if path.exists():
            _keep(path, training["fingerprint"])


def _keep(path: Path, fingerprint: str) -> None:
    """Rename the checkpoint at `path` unless it is from the training `fingerprint`."""
    try:
        old = read(path)["training"]["fingerprint"]
    except UserError:
        old = "unreadable"
    if old != fingerprint:
        kept = path.with_name(f"{path.stem}.{old[:8]}.pt")
        path.replace(kept)
        progress.say(f"checkpoint: the one with other settings is kept as {kept.name}")


def read(path: Path) -> dict:
    """Return a checkpoint's "state_dict", "architecture", "data", "training" and "format".

    Raises `UserError` if the file is missing, has changed since it was written, or is from another
    version of the code.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights, text = content["state_dict"], content["json"]
        facts, intact = json.loads(text), content.get("sha256") == _digest(weights, text)
    except Exception as error:  # unpickling a damaged file can raise anything
        raise UserError(f"{path} is damaged ({type(error).__name__}); train it again.") from None
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of this code; train it again.")
    if not intact:
        raise UserError(
            f"{path} is damaged (its weights changed since they were stored); train it again."
        )
    return {"state_dict": weights, **facts}


def is_of(path: Path, data: Data) -> bool:
    """Whether the file at `path` is an intact checkpoint that was trained on `data`."""
    try:
        return read(path)["data"]["sha256"] == data.digest
    except UserError:
        return False


def load_baseline(run: Run, data: Data, options: Options) -> Checkpoint:
    """Load the FP32 baseline that `run` starts from, in evaluation mode.

    Raises `UserError`, which says how to train it, if it is missing, damaged, from another model or
    trained on other images.
    """
    path = path_of(run.baseline, data.study, options)
    command = cli.command(run.baseline, options.replace(backends=run.baseline.backends[:1]))
    if not path.exists():
        raise UserError(f"no FP32 baseline at {path}. Make it first: {command}")
    try:
        content = read(path)
    except UserError as error:
        raise UserError(f"{str(error).removesuffix('.')}: {command}") from None
    if content["architecture"] != run.model:
        raise UserError(
            f"the baseline at {path} is of the model {content['architecture']}. "
            f"Train {run.model}: {command}"
        )
    names, here = ("sha256", "negative_class", "positive_class"), data.describe()
    if any(content["data"][name] != here[name] for name in names):
        raise UserError(
            f"the baseline at {path} was trained on other images. Train it on these: {command}"
        )
    for name, value in content["state_dict"].items():
        if why := weight_files.unusable(value):
            raise UserError(
                f"the baseline at {path} cannot be used: its tensor {name} {why}. "
                f"Train it again: {command}"
            )
    model = architectures.rebuild(content).eval()
    return Checkpoint(path, model, checksums.note(path), content["training"])
