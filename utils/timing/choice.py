"""Choose what to deploy by latency measured on this machine, within a budget of error.

With `formats="auto"` in its recipe, a network keeps in FP32 the blocks that are faster so, and as
many more as its budget asks for. With `--backend fastest`, a script deploys on the engine that runs
its network fastest within the budget. Either choice holds for this machine, its number of threads and
the first batch size of the options, and the recipe in the run's JSON logs what was compared.

Wu et al. 2020, "Integer Quantization for Deep Learning Inference" (arXiv:2004.09602), section 5.1,
leave the layers in floating point that damage the answers most. Here a block is worth what it removes
in error for the time that it adds, as in the mixed precision of Yao et al. 2021, "HAWQ-V3"
(arXiv:2011.10680), which measures latencies on the hardware, too.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import metrics, progress
from utils.backends import registry
from utils.backends.base import Backend, Deployed
from utils.errors import UserError
from utils.quantize.layers import blocks
from utils.timing import rounds
from utils.timing.worker import EVAL_BATCH, Worker
from utils.training import loop
from utils.training.sessions import Experiment

BUDGET = {"accuracy_drop": 0.003}  # of recipes that name none: at most 0.3 points
BUDGETS = {"sqnr_db": "sqnr_db >= {}", "accuracy_drop": "accuracy_drop <= {}"}
WHOLLY = "all in INT8"
FEW = 64  # calibration images of networks that serve to time and rank blocks only
FASTER = 1.02  # ratio of times from which a block in FP32 counts as faster


@dataclass(frozen=True)
class Trial:
    """A deployed network with its time and its error; the error is against FP32, on validation images."""

    name: str
    ms: float  # median milliseconds of a batch, in the same rounds as the other trials
    sqnr_db: float | None  # None: no error
    accuracy_drop: float  # FP32's accuracy minus this one's, as a share of the images

    def meets(self, budget: dict[str, float]) -> bool:
        """Whether the error is within `budget`, which has keys of BUDGETS."""
        enough = self.sqnr_db is None or self.sqnr_db >= budget.get("sqnr_db", -np.inf)
        return enough and self.accuracy_drop <= budget.get("accuracy_drop", np.inf)

    @property
    def noise(self) -> float:
        """Power of the error relative to that of the logits."""
        return 0.0 if self.sqnr_db is None else 10 ** (-self.sqnr_db / 10)

    def __str__(self) -> str:
        sqnr = "no error" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        return f"{self.name}: {self.ms:.3g} ms, {sqnr}, {100 * self.accuracy_drop:+.2f} points lost"


def plans(
    experiment: Experiment, calibration: torch.Tensor, recipe: dict
) -> Iterator[tuple[Backend, dict]]:
    """Yield each backend to deploy on, and the recipe to quantize by.

    These are the backends of the options and `recipe`, unless something is to be chosen, see above.
    `calibration` is float32 (n, 3, 224, 224), normalised. Raises `UserError` if the budget is not met.
    """
    able = registry.select(experiment.options)
    if experiment.options.fastest:
        backend, log = fastest(experiment, list(able), calibration, recipe)
        yield backend, formats(experiment, backend, calibration, recipe) | log
        return
    for backend in able:
        yield backend, formats(experiment, backend, calibration, recipe)


def budget_of(recipe: dict) -> dict[str, float]:
    """Return the budget that a recipe names, or BUDGET. Raises `ValueError` for an unknown key."""
    budget = recipe.get("budget", BUDGET)
    if not budget or set(budget) - set(BUDGETS) or None in budget.values():
        raise ValueError(
            f"budget={budget} in the recipe: give numbers for one or both of {', '.join(BUDGETS)}"
        )
    return budget


def fastest(
    experiment: Experiment, able: list[Backend], calibration: torch.Tensor, recipe: dict
) -> tuple[Backend, dict]:
    """Return that of the backends `able` which runs the network fastest within the budget, and the log.

    Networks are those of PTQ by `recipe`, for QAT as well, as speed hardly depends on the numbers.
    """
    budget, networks, deployed = budget_of(recipe), {}, {}
    for backend in able:
        config = backend.qdq_config(recipe)
        if config not in networks:  # engines that round alike share a network
            networks[config] = backend.quantized(experiment.baseline.model, calibration, recipe)
        deployed[backend.name] = backend.deploy(networks[config])
    trials = compare(experiment, deployed, fp32_logits(experiment))
    for trial in trials:
        progress.say(f"{trial}{'' if trial.meets(budget) else ', which is over the budget'}")
    within = [trial for trial in trials if trial.meets(budget)]
    if not within:
        raise UserError(
            f"--backend fastest: no engine is within the budget, {_wanted(budget)}; see above."
        )
    best = min(within, key=lambda trial: trial.ms)
    progress.say(f"fastest within {_wanted(budget)}: {best.name}")
    return next(each for each in able if each.name == best.name), {
        "engines": _log(experiment, budget, trials)
    }


def formats(
    experiment: Experiment, backend: Backend, calibration: torch.Tensor, recipe: dict
) -> dict:
    """Return `recipe` with the blocks that stay in FP32 on `backend`, if it says `formats="auto"`.

    First, all blocks in INT8 are compared with each one in FP32. Those that are faster in FP32 stay
    so. Then the block that removes most error for its time is added until the budget is met, by the
    network that `recipe` gives. The result also has `trials`, a JSON-serializable log.
    """
    if "formats" not in recipe:
        return recipe
    if recipe["formats"] != "auto":
        raise ValueError(
            f"formats={recipe['formats']!r} in the recipe: give 'auto', or the blocks in FP32 as `keep_fp32`"
        )
    budget, model = budget_of(recipe), experiment.baseline.model
    count = min(FEW, len(calibration))
    few = calibration[
        torch.arange(count) * len(calibration) // count
    ]  # evenly spaced: the first may be of one class
    plain = {name: value for name, value in recipe.items() if name not in ("formats", "budget")}
    quick = plain | {"reconstruct": False, "adaptive_rounding": False}
    alone = {
        name: backend.quantize(model, few, quick | {"keep_fp32": (name,)}) for name in blocks(model)
    }
    whole = {WHOLLY: backend.quantize(model, few, quick | {"keep_fp32": ()})}
    fp32 = fp32_logits(experiment)
    wholly, *single = compare(experiment, whole | alone, fp32)
    fast = {trial.name for trial in single if wholly.ms / trial.ms > FASTER}
    order = [trial.name for trial in sorted(single, key=lambda trial: _price(wholly, trial))]
    log = []
    for keep in _growing(fast, order):
        chosen = plain | {"keep_fp32": tuple(name for name in blocks(model) if name in keep)}
        label = f"in FP32: {', '.join(chosen['keep_fp32']) or 'nothing'}"
        beside, trial = compare(
            experiment, whole | {label: backend.quantize(model, calibration, chosen)}, fp32
        )
        progress.say(f"{backend.name}, {trial}; {WHOLLY}: {beside.ms:.3g} ms")
        log += [beside, trial]
        if trial.meets(budget):
            return chosen | {"trials": _log(experiment, budget, [wholly, *single, *log])}
    raise UserError(
        f'formats="auto" on {backend.name}: {_wanted(budget)} is not met with all blocks but one in FP32.\n'
        "Relax the budget of the recipe."
    )


def _growing(fast: set[str], order: list[str]) -> Iterator[set[str]]:
    """Yield ever more blocks to keep in FP32, first `fast`, then those in `order`, but for the last.

    The last may be the one that breaks the budget, so all then follow in `order`, from none.
    """
    for keep in (fast, set()) if fast else (fast,):
        yield keep
        for name in [name for name in order if name not in keep][:-1]:
            keep = keep | {name}
            yield keep


def _price(wholly: Trial, trial: Trial) -> float:
    """Milliseconds that a block in FP32 adds for the error that it removes; infinite if it removes none."""
    removed = wholly.noise - trial.noise
    # Less than this is noise: blocks that cost so little are taken by what they remove.
    return max(trial.ms - wholly.ms, (FASTER - 1) * wholly.ms) / removed if removed > 0 else np.inf


def fp32_logits(experiment: Experiment) -> np.ndarray:
    """Return the logits of the FP32 network on the validation images, float32 (n, 2)."""
    return loop.predict(experiment.baseline.model, experiment.data.validation)


def compare(experiment: Experiment, deployed: dict[str, Deployed], fp32: np.ndarray) -> list[Trial]:
    """Time the networks `deployed` in alternating rounds, and measure their errors on validation images.

    `reference` is what `fp32_logits` returned.
    """
    options, split = experiment.options, experiment.data.validation
    with contextlib.ExitStack() as stack:
        folder, sides = Path(stack.enter_context(tempfile.TemporaryDirectory())), []
        with progress.Bar("preparing", len(deployed), "networks") as bar:
            for number, (name, each) in enumerate(deployed.items()):
                path = folder / f"{number}{each.backend.suffix}"
                each.save(path)
                sides.append(
                    stack.enter_context(
                        Worker(each.backend.name, path, options.device, options.threads)
                    )
                )
                bar.step(note=name)
        logits = [side.call("logits", split, EVAL_BATCH) for side in sides]
        seconds = np.median(
            rounds.compare(sides, split, options.batch_sizes[0], 1 if options.smoke else None),
            axis=0,
        )
    return [
        _trial(name, *measured, fp32, split.y)
        for name, *measured in zip(deployed, seconds, logits, strict=True)
    ]


def _trial(name: str, seconds: float, logits: np.ndarray, fp32: np.ndarray, y: np.ndarray) -> Trial:
    if not np.isfinite(logits).all():
        raise UserError(
            f"{name}: some validation logits are not finite, so its error has no size; check the weights."
        )
    # From counts, because the difference of two shares is inexact: 0.9 - 0.7 > 0.2.
    lost = int((fp32.argmax(1) == y).sum()) - int((logits.argmax(1) == y).sum())
    return Trial(name, 1e3 * float(seconds), metrics.sqnr_db(fp32, logits), lost / len(y))


def _wanted(budget: dict[str, float]) -> str:
    return " and ".join(BUDGETS[key].format(limit) for key, limit in budget.items())


def _log(experiment: Experiment, budget: dict[str, float], trials: list[Trial]) -> dict:
    options = experiment.options
    how = {"budget": budget, "threads": options.threads, "batch_size": options.batch_sizes[0]}
    return how | {
        "images": len(experiment.data.validation),
        "tried": [vars(trial) for trial in trials],
    }
