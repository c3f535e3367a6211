"""One run, from deployed network to record: save, load again, measure, store, summarize."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from utils import caveats, checksums, cli, environment, metrics, paths, progress, results, stats
from utils.backends import fp16
from utils.backends.base import Converted, Deployed, Lowered
from utils.catalog import BACKENDS, Run
from utils.data.dataset import Split
from utils.errors import UserError
from utils.experiment import Experiment
from utils.measure import footprint, layer_errors, profiling
from utils.quantize import exact
from utils.quantize.network import Quantized
from utils.recipes import Recipe
from utils.timing import protocol
from utils.timing.worker import EVAL_BATCH, Worker
from utils.training import checkpoints, distributed, loop
from utils.training.checkpoints import Checkpoint

RANDOM_SEED, RANDOM_IMAGES = 20261123, 4
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
    if distributed.rank():
        return
    # Processes that train together share the threads, and sums depend on the number of threads.
    torch.set_num_threads(experiment.options.threads)
    backend, options = deployed.backend, experiment.options
    run = experiment.run.on(backend.name)
    progress.say(f"measuring {run.name} on {backend.name}")
    host = _environment(run, experiment)
    if host["native_fp16"] is False:
        progress.say(
            f"warning: this {options.device.upper()} has no FP16 arithmetic; {backend.name} emulates "
            "it, or computes in FP32"
        )
    path = _saved(run, experiment, deployed)
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
    if options.profile:
        record["profile"] = profiling.profile(deployed, path, experiment)
    # Last, because by now all modules that take part are loaded.
    record["provenance"] = _provenance(run, experiment, path)
    test = experiment.data.test
    names = [test.names[place] for place in test.index]
    written = results.write(record, logits, test.y, options.results, names)
    progress.say(f"{summary(record)}\nwritten: {written}")


def _saved(run: Run, experiment: Experiment, deployed: Deployed) -> Path:
    """Save the artifact, unless it is a file already; returns its path."""
    if deployed.file is not None:
        return deployed.file
    options, backend = experiment.options, deployed.backend
    folder = options.checkpoints / experiment.data.study
    path = folder / f"{run.name}_{backend.name}_seed{options.seed}{backend.suffix}"
    with paths.atomic(path) as temporary:
        deployed.save(temporary)
    checksums.note(path)
    return path


def artifact_logits(
    deployed: Deployed, path: Path, experiment: Experiment
) -> tuple[np.ndarray, dict]:
    """Compute the artifact's test logits, float32 (n, 2), in a fresh process.

    If torch runs the network, checks that saving changed nothing, bit for bit, on the first test
    images and on random inputs, which reach values that photographs do not. Raises `RuntimeError`
    if it did. The second value has the `extremes` of all layers' outputs if the backend is watched
    for overflow, and is empty if not.
    """
    options, test = experiment.options, experiment.data.test
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    noise = torch.randn(RANDOM_IMAGES, 3, 224, 224, generator=generator).to(
        memory_format=torch.channels_last
    )
    first = next(test.batches(EVAL_BATCH))[0]
    if deployed.network is not None:
        deployed.network.to(options.device)
    if isinstance(deployed, Converted):
        deployed.fp32.to(options.device)
    with Worker(deployed.backend.name, path, options.device, options.threads) as worker:
        if deployed.predict:
            _compare(
                deployed, path, "random inputs", noise.to(options.device), worker.call("run", noise)
            )
        if deployed.backend.watched:
            logits, extremes = worker.call("watched", test, EVAL_BATCH)
            facts = {"extremes": extremes}
        else:
            logits, facts = worker.call("logits", test, EVAL_BATCH), {}
        if deployed.predict:
            _compare(deployed, path, "test images", first.to(options.device), logits[: len(first)])
    return logits, facts


@torch.inference_mode()
def _compare(deployed: Deployed, path: Path, name: str, x: torch.Tensor, after: np.ndarray) -> None:
    """Raise `RuntimeError` if the network before saving does not answer `x` by `after`, bit for bit."""
    before = deployed.predict(x).float().cpu().numpy()
    if not np.array_equal(before, after, equal_nan=True):
        largest = np.abs(before - after).max()
        raise RuntimeError(
            f"{path} answers {name} differently from the network before saving, by {largest:.3g}"
        )


def fp32_logits(experiment: Experiment, known: np.ndarray | None = None) -> np.ndarray:
    """Return the test logits of the FP32 network, float32 (n, 2).

    They are computed once, unless `known`, and stored next to the network's checkpoint.
    """
    baseline, options, test = experiment.baseline, experiment.options, experiment.data.test
    key = checkpoints.fingerprint(
        checkpoint=baseline.sha256,
        device=options.device,
        gpu=_gpu(options.device),
        threads=options.threads,
        **_images(test, experiment),
        **_code(f"utils.backends.{BACKENDS['native'].module}", "utils.timing.worker"),
    )
    path = baseline.path.with_suffix(f".{options.device}.logits")

    def compute() -> np.ndarray:
        with Worker("native", baseline.path, options.device, options.threads) as worker:
            return worker.call("logits", test, EVAL_BATCH)

    return _store(path, key, known) if known is not None else _remembered(path, key, compute)


def exact_logits(quantized: Quantized, experiment: Experiment) -> np.ndarray:
    """Return the test logits of the method in exact arithmetic, float32 (n, 2).

    Engines that lower the same network share them: they are stored by its digest.
    """
    test = experiment.data.test
    key = checkpoints.fingerprint(
        network=quantized.digest(),
        **_images(test, experiment),
        **_code("utils.quantize.exact"),
    )
    folder = experiment.baseline.path.parent / "exact"
    path = folder / f"{experiment.run.name}_{key[:16]}.logits"
    return _remembered(path, key, lambda: exact.logits(quantized, test))


def _images(split: Split, experiment: Experiment) -> dict:
    """Return what decides the images of `split`, for the key of a cache."""
    return {"data": experiment.data.digest, "index": split.index.tolist()}


def _code(*modules: str) -> dict:
    """Return what else decides logits: the code, the packages and the processor."""
    return {
        "code": environment.code_of(*modules, "utils.data.decoding", "utils.data.synthetic"),
        "versions": environment.versions(),
        "cpu": environment.cpu(),
    }


def _gpu(device: str) -> str | None:
    return torch.cuda.get_device_name() if device == "cuda" else None


def _remembered(path: Path, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array that was stored at `path` for `key`; compute and store it if there is none."""
    if (content := checksums.read(path)) is not None:
        with np.load(io.BytesIO(content)) as stored:
            if str(stored["key"]) == key:
                return stored["logits"]
    return _store(path, key, compute())


def _store(path: Path, key: str, logits: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), logits=logits)
    checksums.write(path, buffer.getbuffer())
    return logits


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
    return protocol.measure(
        candidate, experiment.baseline, experiment.data.test, experiment.options
    )


def _footprint(deployed: Deployed, path: Path, experiment: Experiment) -> dict:
    image = next(experiment.data.test.batches(1, experiment.options.device))[0]
    known = deployed.network is not None and not experiment.run.simulated_on(deployed.backend.name)
    return {
        "size_mb": footprint.size_mb(path),
        "activation_mb": footprint.activation_mb(deployed.predict, deployed.network, image)
        if known
        else None,
        **footprint.of_operations(experiment.baseline.model, deployed.stored),
        **footprint.of_numbers(deployed.stored),
    }


def _environment(run: Run, experiment: Experiment) -> dict:
    device = experiment.options.device
    return environment.describe(experiment.options.threads) | {
        "native_fp16": fp16.native(device) if run.dtype == "fp16" else None,
        "torch": torch.__version__,
        "gpu": _gpu(device),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def _provenance(run: Run, experiment: Experiment, path: Path) -> dict:
    code = environment.code(run.script)
    return {
        "code_sha256": environment.code_sha256(code),
        "data_sha256": experiment.data.digest,
        "baseline_sha256": experiment.baseline.sha256,
        "artifact_sha256": checksums.sha256_of(path),
        "code": code,
    }


def summary(record: dict) -> str:
    """Summarize a run in a few lines: its main figures and their caveats."""
    quality, study = record["metrics"], record["run"]["study"]
    first = min(range(len(record["timing"])), key=lambda n: _order(record["timing"][n]))
    row = results.rows_of(record)[first]
    lines = [_in_short(row)]
    if row["agreement_reference"] is not None:
        method = (
            "no noise" if row["sqnr_reference_db"] is None else f"{row['sqnr_reference_db']:.1f} dB"
        )
        engine = (
            "nothing"
            if row["sqnr_vs_reference_db"] is None
            else f"{row['sqnr_vs_reference_db']:.1f} dB"
        )
        lines.append(
            f"the method in exact arithmetic: accuracy {100 * row['accuracy_reference']:.2f} %, {method} from FP32; "
            f"the engine adds {engine} and agrees on {100 * row['agreement_reference']:.2f} %"
        )
    if row["accuracy_fake_quant"] is not None:
        accuracy, agreement = 100 * row["accuracy_fake_quant"], 100 * row["agreement_fake_quant"]
        lines.append(
            f"before conversion, rounding in FP32: accuracy {accuracy:.2f} %, agrees on {agreement:.2f} %"
        )
    if seen := record["backend"].get("extremes"):
        largest = f"largest {seen['largest']:.4g}, in {seen['largest_in']}"
        lines.append(f"layer outputs on the test images: {seen['nonfinite']} not finite; {largest}")
    if "verdict" in quality and not study.endswith("_smoke"):
        lines.append(
            f"accuracy of FP32 within {100 * quality['margin']:g} points: {quality['verdict']}"
        )
    words = [words for words in caveats.of(row) if words != "contended"]  # said below, of all rows
    lines += [f"note: {sentence}" for sentence in caveats.explained(words, row["margin"])]
    if contended := [entry for entry in record["timing"] if entry.get("contended")]:
        (meaning,) = caveats.explained(["contended"], row["margin"])
        where = ", ".join(
            f"batch {entry['batch_size']} on {entry['threads']} threads" for entry in contended
        )
        lines.append(f"note: {meaning} It was at {where}.")
    return "\n".join(lines)


def _order(entry: dict) -> tuple:
    return -entry["threads"], entry["batch_size"] or 0


def _in_short(row: dict) -> str:
    low, high = 100 * row["accuracy_ci_low"], 100 * row["accuracy_ci_high"]
    parts = [
        f"{results.run_id(row)}: accuracy {100 * row['accuracy']:.2f} % [{low:.2f}, {high:.2f}]",
        f"agrees with FP32 on {100 * row['agreement_fp32']:.2f} %",
        *([] if row["sqnr_db"] is None else [f"SQNR {row['sqnr_db']:.1f} dB"]),
        f"{row['size_mb']:.2f} MiB",
    ]
    if row["batch_size"] is None:
        return ", ".join([*parts, "simulated: not timed"])
    time = f"{row['latency_ms_p50']:.2f} ms at batch {row['batch_size']}"
    if row["tier"] == "smoke":
        return ", ".join([*parts, f"{time} (smoke: no measurement)"])
    contended = "; contended" if row["contended"] else ""
    eager, best = row["speedup_vs_eager_fp32"], row["speedup_vs_best_fp32"]
    return ", ".join(
        [
            *parts,
            f"{time} ({eager:.2f}x eager FP32, {best:.2f}x the fastest FP32, {row['best_fp32']}{contended})",
        ]
    )
