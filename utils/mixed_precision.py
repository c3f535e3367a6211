"""Mixed precision by measured latency: which blocks stay in FP32, on which engine.

With `formats="auto"` in its recipe, a network keeps in FP32 the blocks that are faster in FP32, and
more blocks until it meets its budget. With `--backend fastest`, a script deploys on the engine that
runs its network fastest within the budget. Both choices hold for this machine, its number of
threads and the first batch size of the options. The recipe in the run's JSON logs the comparison.

Wu et al. 2020, "Integer Quantization for Deep Learning Inference" (arXiv:2004.09602), section 5.1,
leave the layers in floating point that damage the answers most. Here, blocks are ranked by the
error that they remove for the time that they add. Yao et al. 2021, "HAWQ-V3" (arXiv:2011.10680),
also measure latencies on the hardware for mixed precision.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import metrics, progress
from utils.backends.base import Backend, Deployed
from utils.errors import UserError
from utils.experiment import Experiment
from utils.quantize.layers import blocks
from utils.quantize.methods import ptq
from utils.recipes import Budget, Int8
from utils.timing import rounds
from utils.timing.worker import EVAL_BATCH, Worker
from utils.training import loop

WHOLLY = "all in INT8"
FEW = 64  # calibration images of the networks that only time and rank blocks
FASTER = 1.02  # smallest ratio of times that makes a block in FP32 count as faster


@dataclass(frozen=True)
class Trial:
    """The time of a deployed network, and its error against FP32 on validation images."""

    name: str
    ms: float  # median milliseconds of a batch, in the same rounds as the other trials
    sqnr_db: float | None  # None: no error
    accuracy_drop: float  # FP32's accuracy minus this one's, as a share of the images

    def meets(self, budget: Budget) -> bool:
        """Return whether the error is within `budget`."""
        drop, sqnr = budget.accuracy_drop, budget.sqnr_db
        accurate = drop is None or self.accuracy_drop <= drop
        return accurate and (sqnr is None or self.sqnr_db is None or self.sqnr_db >= sqnr)

    @property
    def noise(self) -> float:
        """Power of the error relative to the power of the logits."""
        return 0.0 if self.sqnr_db is None else 10 ** (-self.sqnr_db / 10)

    def __str__(self) -> str:
        sqnr = "no error" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        return f"{self.name}: {self.ms:.3g} ms, {sqnr}, {100 * self.accuracy_drop:+.2f} points lost"


def fastest(experiment: Experiment, able: list[Backend], recipe: Int8) -> tuple[Backend, Int8]:
    """Return the backend of `able` that runs the network fastest within the budget of `recipe`.

    The second value is the recipe with a log of the comparison. Networks are made by PTQ, also for
    QAT, because speed hardly depends on the numbers. Raises `UserError` if none is within the
    budget.
    """
    model, calibration = experiment.baseline.model, _calibration(experiment, recipe)
    networks, deployed = {}, {}
    for backend in able:
        config = backend.qdq_config(recipe)
        if config not in networks:  # engines with equal configurations share a network
            networks[config] = ptq(model, calibration, recipe, config)
        deployed[backend.name] = backend.deploy(networks[config])
    trials = compare(experiment, deployed, fp32_logits(experiment))
    for trial in trials:
        over = "" if trial.meets(recipe.budget) else ", which is over the budget"
        progress.say(f"{trial}{over}")
    within = [trial for trial in trials if trial.meets(recipe.budget)]
    if not within:
        raise UserError(
            "--backend fastest: no engine is within the budget, "
            f"{_wanted(recipe.budget)}; see above."
        )
    best = min(within, key=lambda trial: trial.ms)
    progress.say(f"fastest within {_wanted(recipe.budget)}: {best.name}")
    (chosen,) = [backend for backend in able if backend.name == best.name]
    return chosen, recipe.replace(engines=_log(experiment, recipe.budget, trials))


def choose_formats(experiment: Experiment, backend: Backend, recipe: Int8) -> Int8:
    """Choose the blocks that stay in FP32 on `backend`, and return `recipe` with them.

    First, the network with all blocks in INT8 is compared with networks in which one block is in
    FP32. Blocks that are faster in FP32 stay in FP32. Then the block that removes most error for
    its time is added, until the network by `recipe` meets the budget. Raises `UserError` if it
    never does.
    """
    model, calibration = experiment.baseline.model, _calibration(experiment, recipe)
    count = min(FEW, len(calibration))
    # Evenly spaced: the first may be of one class.
    few = calibration[torch.arange(count) * len(calibration) // count]
    given = recipe.replace(formats="given")
    quick = given.replace(reconstruct=False, adaround=False)

    def deployed(images: torch.Tensor, chosen: Int8, keep: tuple[str, ...]) -> Deployed:
        chosen = chosen.replace(keep_fp32=keep)
        return backend.deploy(ptq(model, images, chosen, backend.qdq_config(chosen)))

    whole = {WHOLLY: deployed(few, quick, ())}
    alone = {name: deployed(few, quick, (name,)) for name in blocks(model)}
    fp32 = fp32_logits(experiment)
    wholly, *single = compare(experiment, whole | alone, fp32)
    fast = {trial.name for trial in single if wholly.ms / trial.ms > FASTER}
    order = [trial.name for trial in sorted(single, key=lambda trial: _price(wholly, trial))]
    log = [wholly, *single]
    for names in _growing(fast, order):
        keep = tuple(name for name in blocks(model) if name in names)
        label = f"in FP32: {', '.join(keep) or 'nothing'}"
        sides = whole | {label: deployed(calibration, given, keep)}
        again, trial = compare(experiment, sides, fp32)
        progress.say(f"{backend.name}, {trial}; {WHOLLY}: {again.ms:.3g} ms")
        log += [again, trial]
        if trial.meets(recipe.budget):
            trials = _log(experiment, recipe.budget, log)
            return given.replace(keep_fp32=keep, trials=trials)
    raise UserError(
        f'formats="auto" on {backend.name}: {_wanted(recipe.budget)} is not met with all blocks '
        "except one in FP32.\nRelax the budget of the recipe."
    )


def _calibration(experiment: Experiment, recipe: Int8) -> torch.Tensor:
    return experiment.data.train.calibration(recipe.calibration_images)


def _growing(fast: set[str], order: list[str]) -> Iterator[set[str]]:
    """Yield growing sets of blocks to keep in FP32: `fast`, then more and more of `order`.

    The last block of `order` is never added. As it may be the block that breaks the budget, blocks
    are then added in `order` to an empty set.
    """
    starts = [fast, set()] if fast else [set()]
    for keep in starts:
        yield keep
        added = [name for name in order if name not in keep]
        for name in added[:-1]:
            keep = keep | {name}
            yield keep


def _price(wholly: Trial, trial: Trial) -> float:
    """Return the milliseconds that a block in FP32 adds per error that it removes, or infinity."""
    removed = wholly.noise - trial.noise
    if removed <= 0:
        return np.inf
    # Smaller differences are noise: these blocks are ranked by the error that they remove.
    return max(trial.ms - wholly.ms, (FASTER - 1) * wholly.ms) / removed


def fp32_logits(experiment: Experiment) -> np.ndarray:
    """Return the logits of the FP32 network on the validation images, float32 (n, 2)."""
    return loop.predict(experiment.baseline.model, experiment.data.validation)


def compare(experiment: Experiment, deployed: dict[str, Deployed], fp32: np.ndarray) -> list[Trial]:
    """Time networks in alternating rounds, and measure their errors on validation images.

    `fp32` are the logits of `fp32_logits`.
    """
    options, split = experiment.options, experiment.data.validation
    with contextlib.ExitStack() as stack:
        folder, sides = Path(stack.enter_context(tempfile.TemporaryDirectory())), []
        with progress.Bar("preparing", len(deployed), "networks") as bar:
            for number, (name, network) in enumerate(deployed.items()):
                path = folder / f"{number}{network.backend.suffix}"
                network.save(path)
                worker = Worker(network.backend.name, path, options.device, options.threads)
                sides.append(stack.enter_context(worker))
                bar.step(note=name)
        logits = [side.call("logits", split, EVAL_BATCH) for side in sides]
        count = 1 if options.smoke else None
        times = rounds.compare(sides, split, options.batch_sizes[0], count)
        seconds = np.median(times, axis=0)
    return [
        _trial(name, *measured, fp32, split.y)
        for name, *measured in zip(deployed, seconds, logits, strict=True)
    ]


def _trial(name: str, seconds: float, logits: np.ndarray, fp32: np.ndarray, y: np.ndarray) -> Trial:
    if not np.isfinite(logits).all():
        raise UserError(
            f"{name}: some validation logits are not finite, so its error has no size; check the "
            "weights."
        )
    # Counts are exact, but the difference of two shares is not: 0.9 - 0.7 > 0.2.
    lost = int((fp32.argmax(1) == y).sum()) - int((logits.argmax(1) == y).sum())
    return Trial(name, 1e3 * float(seconds), metrics.sqnr_db(fp32, logits), lost / len(y))


def _wanted(budget: Budget) -> str:
    parts = []
    if budget.sqnr_db is not None:
        parts.append(f"sqnr_db >= {budget.sqnr_db:g}")
    if budget.accuracy_drop is not None:
        parts.append(f"accuracy_drop <= {budget.accuracy_drop:g}")
    return " and ".join(parts)


def _log(experiment: Experiment, budget: Budget, trials: list[Trial]) -> dict:
    """Return a log of the comparison, JSON-serializable."""
    options = experiment.options
    return {
        "budget": budget.describe(),
        "threads": options.threads,
        "batch_size": options.batch_sizes[0],
        "images": len(experiment.data.validation),
        "tried": [vars(trial) for trial in trials],
    }
