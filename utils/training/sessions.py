"""Trainings as the scripts request them: each runs once, and its result is a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import architectures, checksums, progress
from utils.catalog import Run
from utils.cli import Options
from utils.data.dataset import Data
from utils.errors import UserError
from utils.training import checkpoints, distributed, initial_weights, loop
from utils.training.checkpoints import Checkpoint
from utils.training.initial_weights import Start

SMOKE = {"epochs": 1, "batch_size": 8}


@dataclass(frozen=True)
class Experiment:
    """The objects that a script works with: its run, options, images and FP32 baseline."""

    run: Run
    options: Options
    data: Data
    baseline: Checkpoint


@dataclass(frozen=True)
class _Job:
    """One training: the path of its checkpoint, and everything that decides its outcome."""

    path: Path
    architecture: str
    recipe: dict
    facts: dict  # digest of the initial weights; for QAT, the backend's settings, too
    setup: loop.Setup


def train(run: Run, start: Start, data: Data, recipe: dict, options: Options) -> Checkpoint:
    """Train `start` by `recipe` to the FP32 baseline of `run`, unless done before, and load it.

    Parameters that `start` drew at random learn at `head_lr`, as the last layer does. With
    `silent_branches` in the recipe, `initial_weights.silence_branches` comes first.
    """
    if recipe.get("silent_branches"):
        initial_weights.silence_branches(start.model)
    head = {name for name, _ in start.model.named_parameters() if name not in start.pretrained}
    setup = loop.Setup(
        head | architectures.head(start.model, run.model), options.seed, options.device
    )
    job = _Job(
        checkpoints.path_of(run, data.study, options),
        run.model,
        recipe,
        {"init": start.digest},
        setup,
    )
    _once(job, start.model, data, options)
    return checkpoints.load_baseline(run, data, options)


def finetune(experiment: Experiment, backend, prepared: nn.Module, recipe: dict) -> Checkpoint:
    """Train the QAT network that `backend` prepared from the baseline, unless done before.

    The schedule is recipe["training"]. Backends with equal training settings share the result.
    Scripts share it, too: the three QAT scripts of a model have one control.
    """
    options, baseline = experiment.options, experiment.baseline
    run = experiment.run.on(backend.name)
    tag, settings = backend.training(recipe)
    schedule = recipe["training"]
    teacher = baseline.model if schedule["distill"] else None
    setup = loop.Setup(
        architectures.head(prepared, run.model), options.seed, options.device, teacher
    )
    path = checkpoints.path_of(run, experiment.data.study, options, tag)
    job = _Job(path, run.model, schedule, {"init": baseline.sha256, "backend": settings}, setup)
    facts = _once(job, prepared, experiment.data, options)
    return Checkpoint(path, prepared.eval(), checksums.note(path), facts)


def _once(job: _Job, model: nn.Module, data: Data, options: Options) -> dict:
    """Train `model` in place, or load the result of the same training; return the stored facts."""
    recipe, path = job.recipe | (SMOKE if options.smoke else {}), job.path
    distributed.join(options.device, options.threads, recipe["batch_size"])
    facts = {"recipe": recipe, **job.facts, "data": data.digest, "seed": options.seed}
    # Without the device: a network is trained once, wherever that was, and measured on every device.
    fingerprint = checkpoints.fingerprint(**facts)
    facts["device"] = options.device
    # All processes look for the checkpoint before process 0 may write it, so all decide alike.
    distributed.wait()
    if stored := _done(path, fingerprint):
        progress.say(f"training: done before, {path}; delete it to train again")
        distributed.wait()
        model.load_state_dict(stored["state_dict"])
        return stored["training"]
    distributed.wait()
    resume = loop.Resume(path.with_suffix(".resume"), fingerprint)
    facts |= loop.fit(model, data, recipe, job.setup, resume)
    # Sums in another order round otherwise, so the same training on other threads gives other bits.
    facts |= {
        "fingerprint": fingerprint,
        "processes": distributed.size(),
        "threads": torch.get_num_threads(),
    }
    if distributed.rank() == 0:
        checkpoints.save(path, job.architecture, model, data, facts)
        resume.path.unlink(missing_ok=True)
        progress.say(f"training: saved {path}")
    distributed.wait()
    return facts


def _done(path: Path, fingerprint: str) -> dict | None:
    """Return the checkpoint at `path` if it is of the training `fingerprint`; says so if it is damaged."""
    if not path.exists():
        return None
    try:
        stored = checkpoints.read(path)
    except UserError as error:
        progress.say(f"training: {error}")
        return None
    return stored if stored["training"]["fingerprint"] == fingerprint else None
