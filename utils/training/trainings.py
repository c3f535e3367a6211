"""Trainings as the scripts request them: each is done once, and its result is a checkpoint."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn

from utils import architectures, checksums, environment, progress, recipes
from utils.catalog import Run
from utils.cli import Options
from utils.data.dataset import Data
from utils.errors import UserError
from utils.experiment import Experiment
from utils.training import checkpoints, distributed, initial_weights, loop
from utils.training.checkpoints import Checkpoint
from utils.training.initial_weights import Start

SMOKE = {"epochs": 1, "batch_size": 8}
# The code behind a trained network, with all that these modules import, and the packages whose
# versions decide its bits.
CODE = ("utils.training.trainings", "utils.data.decoding", "utils.data.synthetic")
QAT_CODE = (*CODE, "utils.backends.lowering", "utils.quantize.floating")
PACKAGES = ("torch", "torchvision", "numpy", "pillow")


@dataclass(frozen=True)
class _Job:
    """One training, and everything that decides its result."""

    path: Path  # of its checkpoint
    architecture: str
    schedule: recipes.Schedule
    facts: dict  # of the start: its weights and, for QAT, the recipe and what the backend decides
    setup: loop.Setup


def train(
    run: Run, start: Start, data: Data, recipe: recipes.Training, options: Options
) -> Checkpoint:
    """Train `start` by `recipe` to the FP32 baseline of `run`, unless done before, and load it.

    Parameters that `start` drew at random learn at `head_lr`, as the last layer does.
    """
    if recipe.silent_branches:
        initial_weights.silence_branches(start.model)
    head = {name for name, _ in start.model.named_parameters() if name not in start.pretrained}
    head |= architectures.head(start.model, run.model)
    setup = loop.Setup(head, options.seed, options.device)
    facts = {"init": start.digest, **_code(CODE)}
    path = checkpoints.path_of(run, data.study, options)
    _once(_Job(path, run.model, recipe, facts, setup), start.model, data, options)
    return checkpoints.load_baseline(run, data, options)


def finetune(
    experiment: Experiment, backend, network: nn.Module, recipe: recipes.Int8QAT
) -> Checkpoint:
    """Train the QAT `network` that `backend` prepared by `recipe`, unless done before.

    Backends with equal settings share the result. Scripts share it as well: the three QAT scripts
    of a model have one control.
    """
    options, baseline, schedule = experiment.options, experiment.baseline, recipe.training
    run = experiment.run.on(backend.name)
    tag, settings = backend.training_config(recipe)
    teacher = baseline.model if schedule.distill else None
    head = architectures.head(network, run.model)
    setup = loop.Setup(head, options.seed, options.device, teacher)
    facts = {"init": baseline.sha256, "backend": settings, **_code(QAT_CODE)}
    if run.method == "qat":  # the control rounds nothing
        facts["quantization"] = recipe.decisive()
    else:
        facts["calibration_images"] = recipe.calibration_images
    path = checkpoints.path_of(run, experiment.data.study, options, tag)
    job = _Job(path, run.model, schedule, facts, setup)
    training = _once(job, network, experiment.data, options)
    return Checkpoint(path, network.eval(), checksums.note(path), training)


def _code(modules: tuple[str, ...]) -> dict:
    """Return the digest of the code that trains, and the versions of the packages it relies on."""
    installed = environment.versions()
    return {
        "code_sha256": environment.code_sha256(environment.code_of(*modules)),
        "versions": {package: installed.get(package) for package in PACKAGES},
    }


def _once(job: _Job, model: nn.Module, data: Data, options: Options) -> dict:
    """Train `model` in place, or load the result of the same training; return the stored facts."""
    schedule = job.schedule.replace(**SMOKE) if options.smoke else job.schedule
    distributed.join(options.device, options.threads, schedule.batch_size)
    facts = {"recipe": schedule.describe(), **job.facts, "data": data.digest, "seed": options.seed}
    # Without the device: a network is trained once, on whatever device, and measured on every one.
    fingerprint = checkpoints.fingerprint(**facts)
    facts["device"] = options.device
    with _alone(job.path):
        if stored := _done(job.path, fingerprint):
            progress.say(f"training: reusing {job.path}; delete it to train again")
            model.load_state_dict(stored["state_dict"])
            distributed.wait()
            return stored["training"]
        distributed.wait()  # all have looked before process 0 may write
        resume = loop.Resume(job.path.with_suffix(".resume"), fingerprint)
        facts |= loop.fit(model, data, schedule, job.setup, resume)
        facts |= {
            "fingerprint": fingerprint,
            "processes": distributed.size(),
            # Sums in another order round otherwise: other threads give other bits.
            "threads": torch.get_num_threads(),
        }
        if distributed.rank() == 0:
            checkpoints.save(job.path, job.architecture, model, data, facts)
            resume.path.unlink(missing_ok=True)
            progress.say(f"training: saved {job.path}")
        distributed.wait()
    return facts


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of the checkpoint at `path`; process 0 holds it for its group.

    Whoever asks for the same training meanwhile waits, and then uses the result.
    """
    if distributed.rank():
        distributed.wait()  # until process 0 has the lock
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".training.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"training: waiting for another process that writes {path}")
        lock.acquire()
    try:
        distributed.wait()
        yield
    finally:
        lock.release()


def _done(path: Path, fingerprint: str) -> dict | None:
    """Return the checkpoint at `path` if it is of this training; say so if it is damaged."""
    if not path.exists():
        return None
    try:
        stored = checkpoints.read(path)
    except UserError as error:
        progress.say(f"training: {error}")
        return None
    return stored if stored["training"]["fingerprint"] == fingerprint else None
