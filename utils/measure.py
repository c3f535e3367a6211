"""Everything that is measured about one deployed model, in one place and the same for all."""

import numpy as np
import torch

from utils import checkpoints, cli, environment, footprint, metrics, paths, progress, results, stats, timing
from utils.backends import Deployed
from utils.checkpoints import Checkpoint
from utils.data import Data, Split
from utils.errors import UserError
from utils.worker import EVAL_BATCH, Worker

RANDOM_SEED, RANDOM_IMAGES = 20261123, 8


def run(run: cli.Run, recipe: dict, deployed: Deployed, data: Data, baseline: Checkpoint, args) -> None:
    """Save the artifact, load it in fresh processes, measure it there, write the results and print the main figures.

    Raises `RuntimeError` when the loaded artifact answers otherwise than the model before it was saved.
    """
    backend = deployed.backend
    progress.say(f"measuring {run.name} on {backend.name}")
    path = checkpoints.artifact_path(run, backend, data.study, args)
    with paths.atomic(path) as temporary:
        deployed.save(temporary)
    logits = artifact_logits(deployed, path, data.test, args)
    reference = baseline_logits(baseline, data, args)
    try:
        quality = metrics.classification(logits, data.test.y)
    except ValueError as error:
        raise UserError(f"{run.name} on {backend.name}: {error}") from None
    low, high = stats.wilson(round(quality["accuracy"] * len(logits)), len(logits))
    quality |= {"accuracy_ci_low": low, "accuracy_ci_high": high} | metrics.fidelity(logits, reference)
    candidate, eager = (backend.name, path), ("native", baseline.path)
    times = timing.measure(candidate, eager, data.test, args.batch_sizes, args)
    record = {
        "run": results.describe(run, data.study, backend.name, backend.simulated, args),
        "command": cli.command(run, args, private=True),
        "recipe": recipe,
        "metrics": quality,
        "footprint": _footprint(deployed, baseline, path),
        "environment": _environment(args),
        "data": data.describe(),
        "provenance": _provenance(run, data, baseline, path),
        "training": baseline.training,
        "backend": deployed.facts,
        "timing": times,
    }
    written = results.write(record, logits, data.test.y, args.results)
    _summarize(record, written)


def artifact_logits(deployed: Deployed, path, test: Split, args) -> np.ndarray:
    """Test logits of the artifact in a fresh process, float32 (n, 2), after checking that saving it changed nothing.

    The check compares bits, on random inputs too: those reach values that photographs do not.
    """
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    noise = torch.randn(RANDOM_IMAGES, 3, 224, 224, generator=generator).to(memory_format=torch.channels_last)
    first = next(test.batches(EVAL_BATCH))[0]
    with Worker(deployed.backend.name, path, args.device, args.threads) as worker, torch.inference_mode():
        for name, x in (("random inputs", noise), ("test images", first)):
            before = deployed.predict(x.to(args.device)).float().cpu().numpy()
            if not np.array_equal(before, after := worker.call("run", x)):
                raise RuntimeError(f"{path} answers {name} otherwise than before saving, by {np.abs(before - after).max():.3g}")
        return worker.call("logits", test, EVAL_BATCH)


def baseline_logits(baseline: Checkpoint, data: Data, args) -> np.ndarray:
    """Test logits of the FP32 baseline, float32 (n, 2): computed once and kept beside its checkpoint."""
    key = checkpoints.fingerprint(checkpoint=baseline.sha256, index=data.test.index.tolist(), device=args.device)
    stored = baseline.path.with_suffix(f".{args.device}.logits.npz")
    if stored.exists():
        with np.load(stored) as content:
            if str(content["key"]) == key:
                return content["logits"]
    with Worker("native", baseline.path, args.device, args.threads) as worker:
        logits = worker.call("logits", data.test, EVAL_BATCH)
    with paths.atomic(stored) as temporary, temporary.open("wb") as file:
        np.savez(file, key=np.array(key), logits=logits)
    return logits


def _footprint(deployed: Deployed, baseline: Checkpoint, path) -> dict:
    return {
        "size_mb": footprint.size_mb(path),
        "parameters": deployed.parameters,
        "macs": footprint.macs(baseline.model),
        "weight_modules": deployed.weight_modules,
        "quantized_modules": deployed.quantized_modules,
        "quantized_share": deployed.quantized_parameters / deployed.parameters,
    }


def _environment(args) -> dict:
    found = environment.describe(args.threads)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return found | {"torch": torch.__version__, "gpu": gpu, "torch_isa": torch.backends.cpu.get_cpu_capability()}


def _provenance(run: cli.Run, data: Data, baseline: Checkpoint, path) -> dict:
    return {
        "code_sha256": environment.code_sha256(run.script),
        "data_sha256": data.digest,
        "baseline_sha256": baseline.sha256,
        "artifact_sha256": checkpoints.sha256_of(path),
    }


def _summarize(record: dict, path) -> None:
    quality, first = record["metrics"], record["timing"][0]
    sqnr = "" if quality["sqnr_db"] is None else f", SQNR {quality['sqnr_db']:.1f} dB"
    progress.say(
        f"{results.run_id(record['run'])}: accuracy {100 * quality['accuracy']:.2f} % "
        f"[{100 * quality['accuracy_ci_low']:.2f}, {100 * quality['accuracy_ci_high']:.2f}], "
        f"agrees with FP32 on {100 * quality['agreement_fp32']:.2f} %{sqnr}, "
        f"{record['footprint']['size_mb']:.2f} MiB, {first['latency_ms_p50']:.2f} ms at batch {first['batch_size']} "
        f"({first['speedup_vs_eager_fp32']:.2f}x eager FP32)\nwritten: {path}"
    )
