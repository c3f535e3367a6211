"""Everything that is measured about one deployed model, in one place and the same for all."""

from pathlib import Path

import numpy as np
import torch

from utils import (
    checkpoints,
    cli,
    diagnose,
    distributed,
    environment,
    footprint,
    metrics,
    paths,
    progress,
    results,
    stats,
    timing,
    train,
)
from utils.backends import Backend, Deployed, fp16
from utils.checkpoints import Checkpoint
from utils.data import Data, Split
from utils.errors import UserError
from utils.worker import EVAL_BATCH, Worker

RANDOM_SEED, RANDOM_IMAGES = 20261123, 8
DIAGNOSED, SMOKE_DIAGNOSED = 32, 2  # validation images behind the figures of each layer


def run(
    run: cli.Run, recipe: dict, deployed: Deployed, data: Data, baseline: Checkpoint, args, trained: Checkpoint | None = None
) -> None:
    """Save the artifact, load it in fresh processes, measure it there, write the results and print the main figures.

    `trained` is what QAT made of the baseline. Of several processes that trained together, only the first measures.
    Raises `RuntimeError` when the loaded artifact answers otherwise than the model before it was saved.
    """
    if distributed.rank():
        return
    backend, run = deployed.backend, run.on(deployed.backend.name)
    progress.say(f"measuring {run.name} on {backend.name}")
    host = _environment(run, args)
    if host["native_fp16"] is False:
        progress.say(f"warning: this {args.device.upper()} has no FP16 arithmetic; {backend.name} is emulated and very slow")
    path = _saved(run, deployed, data, args)
    logits, numerics = artifact_logits(deployed, path, data.test, args)
    reference = baseline_logits(baseline, data, args, logits if path == baseline.path else None)
    record = {
        "run": results.describe(run, data.study, backend.name, backend.simulated, args),
        "command": cli.command(run, args, backend.name, private=True),
        "recipe": recipe,
        "metrics": _metrics(f"{run.name} on {backend.name}", logits, reference, deployed, data.test, args),
        "footprint": _footprint(deployed, baseline, path, data.test, args),
        "environment": host,
        "data": data.describe(),
        "provenance": _provenance(run, data, baseline, path),
        "training": (trained or baseline).training,
        "backend": deployed.facts | numerics,
        "layers": diagnose.layers(deployed, data.validation.calibration(SMOKE_DIAGNOSED if args.smoke else DIAGNOSED)),
        "timing": _times(backend, path, baseline, data.test, args),
    }
    written = results.write(record, logits, data.test.y, args.results)
    _summarize(record, written)


def _saved(run: cli.Run, deployed: Deployed, data: Data, args) -> Path:
    """The artifact's file."""
    if isinstance(deployed.save, Path):
        return deployed.save
    path = checkpoints.artifact_path(run, deployed.backend, data.study, args)
    with paths.atomic(path) as temporary:
        deployed.save(temporary)
    return path


def artifact_logits(deployed: Deployed, path: Path, test: Split, args) -> tuple[np.ndarray, dict]:
    """Test logits of the artifact in a fresh process, float32 (n, 2), after checking that saving it changed nothing.

    The check compares bits, on random inputs too: those reach values that photographs do not. The second value holds what
    was seen of overflow, for backends that are watched.
    """
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    noise = torch.randn(RANDOM_IMAGES, 3, 224, 224, generator=generator).to(memory_format=torch.channels_last)
    first = next(test.batches(EVAL_BATCH))[0]
    for network in filter(None, (deployed.network, deployed.reference)):
        network.to(args.device)
    with Worker(deployed.backend.name, path, args.device, args.threads) as worker, torch.inference_mode():
        for name, x in (("random inputs", noise), ("test images", first)):
            before = deployed.predict(x.to(args.device)).float().cpu().numpy()
            if not np.array_equal(before, after := worker.call("run", x), equal_nan=True):
                raise RuntimeError(f"{path} answers {name} otherwise than before saving, by {np.abs(before - after).max():.3g}")
        if not deployed.backend.watched:
            return worker.call("logits", test, EVAL_BATCH), {}
        logits, found = worker.call("watched", test, EVAL_BATCH)
        return logits, {"extremes": found}


def baseline_logits(baseline: Checkpoint, data: Data, args, known: np.ndarray | None = None) -> np.ndarray:
    """Test logits of the FP32 baseline, float32 (n, 2): computed once, unless `known`, and kept beside its checkpoint."""
    key = checkpoints.fingerprint(checkpoint=baseline.sha256, index=data.test.index.tolist(), device=args.device)
    stored = baseline.path.with_suffix(f".{args.device}.logits.npz")
    if known is None and stored.exists():
        with np.load(stored) as content:
            if str(content["key"]) == key:
                return content["logits"]
    if known is None:
        with Worker("native", baseline.path, args.device, args.threads) as worker:
            known = worker.call("logits", data.test, EVAL_BATCH)
    with paths.atomic(stored) as temporary, temporary.open("wb") as file:
        np.savez(file, key=np.array(key), logits=known)
    return known


def _metrics(name: str, logits: np.ndarray, reference: np.ndarray, deployed: Deployed, test: Split, args) -> dict:
    try:
        quality = metrics.classification(logits, test.y)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    low, high = stats.wilson(round(quality["accuracy"] * len(logits)), len(logits))
    quality |= {"accuracy_ci_low": low, "accuracy_ci_high": high} | metrics.fidelity(logits, reference)
    if logits is not reference:
        quality |= stats.against(logits.argmax(1) == test.y, reference.argmax(1) == test.y)
    if deployed.fake_quant is not None:
        decisions = train.predict(deployed.fake_quant.to(args.device), test, args.device).argmax(1)
        quality["accuracy_fake_quant"] = float((decisions == test.y).mean())
        quality["agreement_fake_quant"] = float((decisions == logits.argmax(1)).mean())
    return quality


def _times(backend: Backend, path: Path, baseline: Checkpoint, test: Split, args) -> list[dict]:
    if backend.simulated:
        return [{"batch_size": None, "threads": args.threads}]  # not timed: its speed says nothing
    return timing.measure((backend.name, path), baseline, test, args)


def _footprint(deployed: Deployed, baseline: Checkpoint, path: Path, test: Split, args) -> dict:
    image = next(test.batches(1, args.device))[0]
    activations = None if deployed.backend.simulated else footprint.activation_mb(deployed.predict, deployed.network, image)
    return {
        "size_mb": footprint.size_mb(path),
        "theoretical_mb": deployed.weight_bytes / footprint.MIB,
        "activation_mb": activations,
        "parameters": deployed.parameters,
        "macs": footprint.macs(baseline.model),
        "weight_modules": deployed.weight_modules,
        "quantized_modules": deployed.quantized_modules,
        "quantized_share": deployed.quantized_parameters / deployed.parameters,
    }


def _environment(run: cli.Run, args) -> dict:
    found = environment.describe(args.threads)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    found["native_fp16"] = fp16.native(args.device) if run.dtype == "fp16" else None
    return found | {"torch": torch.__version__, "gpu": gpu, "torch_isa": torch.backends.cpu.get_cpu_capability()}


def _provenance(run: cli.Run, data: Data, baseline: Checkpoint, path: Path) -> dict:
    return {
        "code_sha256": environment.code_sha256(run.script),
        "data_sha256": data.digest,
        "baseline_sha256": baseline.sha256,
        "artifact_sha256": checkpoints.sha256_of(path),
    }


def _summarize(record: dict, path: Path) -> None:
    quality = record["metrics"]
    first = min(record["timing"], key=lambda entry: (-entry["threads"], entry["batch_size"] or 0))
    sqnr = "" if quality["sqnr_db"] is None else f", SQNR {quality['sqnr_db']:.1f} dB"
    speed = "simulated: not timed"
    if first["batch_size"] is not None:
        speed = f"{first['latency_ms_p50']:.2f} ms at batch {first['batch_size']}"
        speed += f" ({first['speedup_vs_eager_fp32']:.2f}x eager FP32, "
        speed += f"{first['speedup_vs_best_fp32']:.2f}x the fastest FP32, {first['best_fp32']})"
    if "accuracy_fake_quant" in quality:
        speed += f"\nbefore conversion, rounding in FP32: accuracy {100 * quality['accuracy_fake_quant']:.2f} %"
        speed += f", agrees on {100 * quality['agreement_fake_quant']:.2f} %"
    if seen := record["backend"].get("extremes"):
        speed += (
            f"\non the test images {seen['nonfinite']} values not finite; largest {seen['largest']:.4g}, in {seen['largest_in']}"
        )
    progress.say(
        f"{results.run_id(record['run'])}: accuracy {100 * quality['accuracy']:.2f} % "
        f"[{100 * quality['accuracy_ci_low']:.2f}, {100 * quality['accuracy_ci_high']:.2f}], "
        f"agrees with FP32 on {100 * quality['agreement_fp32']:.2f} %{sqnr}, "
        f"{record['footprint']['size_mb']:.2f} MiB, {speed}\nwritten: {path}"
    )
