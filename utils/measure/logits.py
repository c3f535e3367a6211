"""Logits of the test images: from the artifact, from FP32, and in exact arithmetic."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from utils import checksums, environment
from utils.backends.base import Converted, Deployed
from utils.catalog import BACKENDS
from utils.data.dataset import Split
from utils.experiment import Experiment
from utils.quantize import exact
from utils.quantize.network import Quantized
from utils.timing.worker import EVAL_BATCH, Worker
from utils.training import checkpoints

RANDOM_SEED, RANDOM_IMAGES = 20261123, 4


def artifact_logits(
    deployed: Deployed, path: Path, experiment: Experiment
) -> tuple[np.ndarray, dict]:
    """Compute the artifact's test logits, float32 (n, 2), in a fresh process.

    If torch runs the network, its answers before saving must be the same bit for bit, on the first
    test images and on random inputs, which reach values that photographs do not; `RuntimeError` is
    raised if they differ. The second value has the `extremes` of all layers' outputs if the backend
    is watched for overflow, and is empty otherwise.
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
    """Raise `RuntimeError` unless the network before saving answers `x` with exactly `after`."""
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
        gpu=gpu(options.device),
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


def gpu(device: str) -> str | None:
    """Return the name of the GPU; None on the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def _remembered(path: Path, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the logits stored at `path` for `key`; compute and store them if there are none."""
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
