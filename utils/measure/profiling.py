"""Where the time of a deployed network goes: its operators, and those of FP32 beside them."""

import dataclasses
from pathlib import Path

from utils import progress
from utils.backends.base import Deployed
from utils.backends.operator_times import Timed, by_kind
from utils.catalog import BACKENDS
from utils.experiment import Experiment
from utils.timing.worker import Worker

RUNS, SMOKE_RUNS = 30, 2  # that each time is the mean of


def profile(deployed: Deployed, path: Path, experiment: Experiment) -> dict | None:
    """Measure the operators of the artifact at `path`, and print the largest shares.

    `fp32` has those of the FP32 network on the same engine, or on eager PyTorch if the engine runs
    no FP32. Returns None, and says so, if an engine does not tell.
    """
    options, name = experiment.options, deployed.backend.name
    size, runs = options.batch_sizes[0], SMOKE_RUNS if options.smoke else RUNS

    def measured(backend: str, file: Path) -> list[Timed] | None:
        with Worker(backend, file, options.device, options.threads) as worker:
            return worker.call("profile", experiment.data.test, size, runs)

    beside = name if BACKENDS[name].fp32 else "native"
    ours, fp32 = measured(name, path), measured(beside, experiment.baseline.path)
    if ours is None or fp32 is None:
        progress.say(
            f"profile: {name} on {options.device} does not tell the times of its operators"
        )
        return None
    total = sum(each.ms for each in ours)
    shares = [
        f"{kind} {form} {ms / total:.0%}" for (kind, form), ms in list(by_kind(ours).items())[:4]
    ]
    progress.say(f"profile of batch {size}: {', '.join(shares)}")
    return {
        "batch_size": size,
        "threads": options.threads,
        "operators": [dataclasses.asdict(each) | {"kind": each.kind} for each in ours],
        "fp32_backend": beside,
        "fp32": [dataclasses.asdict(each) | {"kind": each.kind} for each in fp32],
    }
