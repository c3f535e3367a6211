"""Benchmark of an evaluation on test images: its cost beyond the forward passes."""

from collections.abc import Callable, Iterator

import numpy as np
import paired
import pictures

from utils import architectures, metrics, stats
from utils.data.dataset import Split
from utils.timing.worker import EVAL_BATCH, Worker
from utils.training import checkpoints

IMAGES = {"resnet18": 64, "mobilenetv3": 512}  # enough for seconds of work


def evaluation(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time an evaluation against its forward passes alone, with the same worker process.

    The evaluation loads images from the cache, gets logits from the worker and computes metrics.
    The forward passes run on one batch that the worker holds, once per batch of the evaluation.
    """
    few = pictures.prepared(settings, 2 * EVAL_BATCH)
    for name, count in IMAGES.items():
        count = EVAL_BATCH if settings.smoke else count
        index = np.resize(np.random.default_rng(0).permutation(len(few)), count)
        split = Split(few.images, few.labels, few.names, index)
        path, model = settings.folder / f"{name}.pt", architectures.build(name)
        checkpoints.save(path, name, model, pictures.as_data(split), {"fingerprint": name})
        with Worker("native", path, "cpu", paired.THREADS) as worker:
            worker.call("hold", split, EVAL_BATCH)
            worker.call("time", 2)  # the first runs are slower
            full, forward = paired.turn(whole(worker, split)), passes(worker, count // EVAL_BATCH)
            what = f"evaluation of {name}, over its forward passes alone"
            yield paired.cost(what, full, forward, 1.1, 1 if settings.smoke else 8)


def whole(worker: Worker, split: Split) -> Callable[[], None]:
    """Make a call that evaluates a network on its test images, as a script does."""

    def work() -> None:
        logits = worker.call("logits", split, EVAL_BATCH)
        right = logits.argmax(1) == split.y
        quality = metrics.classification(logits, split.y) | metrics.fidelity(logits, logits[::-1])
        stats.wilson(round(quality["accuracy"] * len(split)), len(split))
        stats.against(right, right[::-1])

    return work


def passes(worker: Worker, count: int) -> paired.Turn:
    """Make a turn of `count` forward passes on the batch that the worker holds."""
    return lambda: [sum(worker.call("time", count))]
