"""One run, from deployed network to record: save, load again, measure, store, summarize."""

from pathlib import Path

import numpy as np
import torch

from utils import (
    checksums,
    cli,
    environment,
    layer_counts,
    metrics,
    paths,
    progress,
    results,
    stats,
)
from utils.backends import fp16, tf32
from utils.backends.base import Deployed, Lowered
from utils.catalog import Run
from utils.errors import UserError
from utils.experiment import Experiment
from utils.measure import footprint, layer_errors, profiling
from utils.measure.logits import artifact_logits, exact_logits, fp32_logits, gpu
from utils.measure.summary import summary
from utils.recipes import Recipe
from utils.timing import protocol
from utils.training import distributed, loop
from utils.training.checkpoints import Checkpoint

DIAGNOSED, SMOKE_DIAGNOSED = 32, 2  # validation images for the per-layer figures


def run(
    experiment: Experiment, recipe: Recipe, deployed: Deployed, trained: Checkpoint | None = None
) -> None:
    """Save the artifact, load it in fresh processes, measure it there and write the results.

    Prints the main figures. `trained` is the checkpoint that QAT made from the baseline. If several
    processes trained together, only the first measures, with all threads of the options. Raises
    `RuntimeError` if the loaded artifact answers differently from the network before saving, and
    `UserError` if a logit is not finite.
    """
    if not distributed.rank():
        with tf32.forbidden(experiment.options.device):
            _measure(experiment, recipe, deployed, trained)


def _measure(
    experiment: Experiment, recipe: Recipe, deployed: Deployed, trained: Checkpoint | None
) -> None:
    # Processes that train together share the threads, and sums depend on the number of threads.
    torch.set_num_threads(experiment.options.threads)
    backend, options = deployed.backend, experiment.options
    run = experiment.run.on(backend.name)
    progress.say(f"measuring {run.name} on {backend.name}")
    host = _environment(run, experiment)
    if host["native_fp16"] is False:
        device = options.device.upper()
        emulates = f"{backend.name} emulates it, or computes in FP32"
        progress.say(f"warning: this {device} has no FP16 arithmetic; {emulates}")
    path = _saved(experiment, deployed)
    logits, numerics = artifact_logits(deployed, path, experiment)
    fp32 = fp32_logits(experiment, logits if path == experiment.baseline.path else None)
    kernels = backend.kernels(path)
    shown = experiment.data.validation.calibration(SMOKE_DIAGNOSED if options.smoke else DIAGNOSED)
    alone = options.replace(backends=(backend.name,), fastest=False)
    record = {
        "run": results.describe(run, experiment.data.study, backend.name, options),
        "command": cli.published_command(experiment.run, alone),
        "recipe": recipe.describe(),
        "metrics": _metrics(logits, fp32, deployed, experiment, trained),
        "footprint": _footprint(deployed, path, experiment),
        "environment": host,
        "data": experiment.data.describe(),
        "training": (trained or experiment.baseline).training,
        "backend": deployed.facts | numerics | ({} if kernels is None else {"kernels": kernels}),
        "layers": layer_errors.errors(deployed, shown),
        "timing": _times(deployed, path, experiment),
    }
    record["footprint"]["integer_layers"] = layer_counts.integer_layers(record)
    if options.profile:
        record["profile"] = profiling.profile(deployed, path, experiment)
    # Last, because by now all modules that take part are loaded.
    record["provenance"] = _provenance(run, experiment, path)
    test = experiment.data.test
    names = [test.names[place] for place in test.index]
    written = results.write(record, logits, test.y, options.results, names)
    progress.say(f"{summary(record)}\nwritten: {written}")


def _saved(experiment: Experiment, deployed: Deployed) -> Path:
    """Save the artifact, unless it is a file already; returns its path."""
    if deployed.file is not None:
        return deployed.file
    options, backend = experiment.options, deployed.backend
    name = f"{experiment.run.on(backend.name).name}_{backend.name}_seed{options.seed}"
    path = options.checkpoints / experiment.data.study / f"{name}{backend.suffix}"
    with paths.atomic(path) as temporary:
        deployed.save(temporary)
    checksums.note(path)
    return path


def _metrics(
    logits: np.ndarray,
    fp32: np.ndarray,
    deployed: Deployed,
    experiment: Experiment,
    trained: Checkpoint | None,
) -> dict:
    test, device = experiment.data.test, experiment.options.device
    name = f"{experiment.run.name} on {deployed.backend.name}"
    try:
        quality = metrics.classification(logits, test.y)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    low, high = stats.wilson(round(quality["accuracy"] * len(logits)), len(logits))
    quality |= {"accuracy_ci_low": low, "accuracy_ci_high": high}
    quality |= metrics.fidelity(logits, fp32)
    decisions = logits.argmax(1)
    single = experiment.data.without_duplicates
    if single.any() and not single.all():
        right = (decisions == test.y)[single]
        quality["accuracy_without_near_duplicates"] = float(right.mean())
    if logits is not fp32:
        quality |= stats.against(decisions == test.y, fp32.argmax(1) == test.y)
    if not isinstance(deployed, Lowered):
        return quality
    exact = exact_logits(deployed.quantized, experiment)
    quality |= {
        "accuracy_reference": float((exact.argmax(1) == test.y).mean()),
        "sqnr_reference_db": metrics.sqnr_db(fp32, exact),
        "sqnr_vs_reference_db": metrics.sqnr_db(exact, logits),
        "agreement_reference": float((exact.argmax(1) == decisions).mean()),
    }
    if trained is not None:
        fake_quant = loop.predict(trained.model.to(device), test, device).argmax(1)
        quality["accuracy_fake_quant"] = float((fake_quant == test.y).mean())
        quality["agreement_fake_quant"] = float((fake_quant == decisions).mean())
    return quality


def _times(deployed: Deployed, path: Path, experiment: Experiment) -> list[dict]:
    if experiment.run.simulated_on(deployed.backend.name):
        # Not timed: the speed of a simulation says nothing.
        return [{"batch_size": None, "threads": experiment.options.threads}]
    candidate = deployed.backend.name, path
    return protocol.measure(candidate, experiment)


def _footprint(deployed: Deployed, path: Path, experiment: Experiment) -> dict:
    image = next(experiment.data.test.batches(1, experiment.options.device))[0]
    activations = None
    if deployed.network is not None and not experiment.run.simulated_on(deployed.backend.name):
        activations = footprint.activation_mb(deployed.predict, deployed.network, image)
    return {
        "size_mb": footprint.size_mb(path),
        "activation_mb": activations,
        **footprint.of_operations(experiment.baseline.model, deployed.stored),
        **footprint.of_numbers(deployed.stored),
    }


def _environment(run: Run, experiment: Experiment) -> dict:
    device = experiment.options.device
    return environment.describe(experiment.options.threads) | {
        "native_fp16": fp16.native(device) if run.dtype == "fp16" else None,
        "torch": torch.__version__,
        "gpu": gpu(device),
        "tf32": any(tf32.allowed()) if device == "cuda" else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def _provenance(run: Run, experiment: Experiment, path: Path) -> dict:
    code = environment.code(run.script)
    return {
        "code_sha256": environment.code_sha256(code),
        "data_sha256": experiment.data.digest,
        "baseline_sha256": experiment.baseline.sha256,
        "artifact": path.name,
        "artifact_sha256": checksums.sha256_of(path),
        "code": code,
    }
