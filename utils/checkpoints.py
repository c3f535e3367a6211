"""Trained weights on disk: one FP32 baseline for each model and seed, which every quantized script loads."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from utils import architectures, cli, paths, progress
from utils.data import Data
from utils.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and where it came from."""

    path: Path
    model: nn.Module  # FP32, evaluation mode; after QAT with its rounding
    sha256: str  # of the file
    training: dict  # fingerprint, recipe, init, seed, history, best_epoch, training_dtype


def path_of(run: cli.Run, study: str, args, tag: str = "") -> Path:
    """Where the trained weights of `run` lie; a `tag` tells apart what was trained for different engines."""
    return args.checkpoints / study / f"{run.name}{'_' * bool(tag)}{tag}_seed{args.seed}.pt"


def fingerprint(**facts) -> str:
    """sha256 over everything that decides the outcome of a training run, given as JSON-able values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_path(run: cli.Run, backend, study: str, args) -> Path:
    """Where the deployed artifact of `run` on `backend` lies."""
    return args.checkpoints / study / f"{run.name}_{backend.name}_seed{args.seed}{backend.suffix}"


def save(path: Path, architecture: str, model: nn.Module, data: Data, training: dict) -> None:
    """Write weights and training facts atomically. A file that other settings made is kept beside it, never overwritten."""
    if path.exists():
        try:
            old = read(path)["training"]["fingerprint"]
        except UserError:
            old = "unreadable"
        if old != training["fingerprint"]:
            kept = path.with_name(f"{path.stem}.{old[:8]}.pt")
            path.replace(kept)
            progress.say(f"checkpoint: the one made with other settings is kept as {kept.name}")
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    facts = {"format": FORMAT, "architecture": architecture, "data": data.describe(), "training": training}
    with paths.atomic(path) as temporary:
        torch.save({"state_dict": weights, "json": json.dumps(facts)}, temporary)


def read(path: Path) -> dict:
    """Content of a checkpoint: "state_dict", "architecture", "data", "training"; raises `UserError` when it is no such file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {"state_dict": content["state_dict"], **json.loads(content["json"])}
    except Exception as error:  # unpickling a damaged file raises nearly anything
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it and train again.") from None


def load(run: cli.Run, data: Data, args) -> Checkpoint:
    """The FP32 baseline that `run` starts from; raises `UserError` with the command that makes it when there is none.

    A smoke run makes its own baseline by that command, so that `--smoke` checks the whole path by itself.
    """
    baseline = cli.Run(run.model, "fp32", "fp32")
    path = path_of(baseline, data.study, args)
    command = cli.command(baseline, args)
    if args.smoke and run.method != "fp32":
        _make_for_smoke(baseline, path, command, data, args)
    if not path.exists():
        raise UserError(f"no FP32 baseline at {path}. Make it first: {command}")
    content = read(path)
    if content["data"]["sha256"] != data.digest:
        raise UserError(f"the baseline at {path} was trained on other images. Train it on these: {command}")
    model = architectures.build(run.model)
    model.load_state_dict(content["state_dict"])
    return Checkpoint(path, model.eval(), sha256_of(path), content["training"])


def _make_for_smoke(baseline: cli.Run, path: Path, command: str, data: Data, args) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # several processes may need it at once
        if path.exists() and read(path)["data"]["sha256"] == data.digest:
            return
        progress.say(f"smoke: no baseline yet, making it: {command}")
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        if subprocess.run([sys.executable, paths.ROOT / baseline.script, *_options(args)], env=alone).returncode:
            raise UserError(f"making the baseline failed: {command}")


def _options(args) -> list[str]:
    """The options of this process for the script that makes its smoke baseline."""
    options = ["--smoke", "--seed", str(args.seed), "--threads", str(args.threads), "--batch-sizes", "1"]
    options += ["--results", str(args.results), "--checkpoints", str(args.checkpoints)]
    return options + (["--data", str(args.data)] if args.data else [])
