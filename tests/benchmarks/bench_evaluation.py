"""The evaluation of a deployed model on its test images: what it costs beyond the forward passes."""

from collections.abc import Iterator

import numpy as np
import paired
import pictures

from utils import architectures, checkpoints, metrics, stats
from utils.data import Split
from utils.worker import EVAL_BATCH, Worker

IMAGES = {"resnet18": 64, "mobilenetv3": 512}  # for seconds of either


def evaluation(settings: paired.Settings) -> Iterator[paired.Row]:
    """Images from the cache, logits from another process and metrics, over the forward passes alone in the same process.

    These run on a batch that the process holds, as often as there are batches.
    """
    few = pictures.prepared(settings, 2 * EVAL_BATCH)
    for name, count in IMAGES.items():
        count = EVAL_BATCH if settings.smoke else count
        split = Split(few.images, few.labels, few.names, np.resize(np.random.default_rng(0).permutation(len(few)), count))
        path = settings.folder / f"{name}.pt"
        checkpoints.save(path, name, architectures.build(name), pictures.as_data(split), {"fingerprint": name})
        with Worker("native", path, "cpu", paired.THREADS) as worker:
            worker.call("hold", split, EVAL_BATCH)
            worker.call("time", 2)  # the first runs are slower
            full, forward = paired.turn(whole(worker, split)), passes(worker, count // EVAL_BATCH)
            what = f"evaluation of {name}, over its forward passes alone"
            yield paired.cost(what, full, forward, 1.1, 1 if settings.smoke else 8)


def whole(worker: Worker, split: Split):
    """All that a script does with its test images."""

    def work() -> None:
        logits = worker.call("logits", split, EVAL_BATCH)
        right = logits.argmax(1) == split.y
        found = metrics.classification(logits, split.y) | metrics.fidelity(logits, logits[::-1])
        stats.wilson(round(found["accuracy"] * len(split)), len(split))
        stats.against(right, right[::-1])

    return work


def passes(worker: Worker, count: int) -> paired.Turn:
    return lambda: [sum(worker.call("time", count))]
