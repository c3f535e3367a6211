"""The operator times of a deployed network, next to the operator times of FP32."""

import dataclasses
from pathlib import Path

from utils import progress
from utils.backends.base import Deployed
from utils.backends.operator_times import Timed, by_kind
from utils.catalog import BACKENDS
from utils.experiment import Experiment
from utils.timing.worker import Worker

RUNS, SMOKE_RUNS = 30, 2  # per mean
SHOWN = 4  # shares that are printed


def profile(deployed: Deployed, path: Path, experiment: Experiment) -> dict | None:
    """Time the operators of the artifact at `path`, and print the largest shares.

    `fp32` has the operators of the FP32 network on the same engine, or on eager PyTorch if the
    engine does not run FP32. Returns None, with a message, if an engine reports no operator times.
    """
    options, name = experiment.options, deployed.backend.name
    fp32_name = name if BACKENDS[name].fp32 else "native"
    ours = _operators(name, path, experiment)
    fp32 = _operators(fp32_name, experiment.baseline.path, experiment)
    if ours is None or fp32 is None:
        progress.say(f"profile: {name} on {options.device} reports no operator times")
        return None
    batch_size = options.batch_sizes[0]
    total, largest = sum(operator.ms for operator in ours), list(by_kind(ours).items())[:SHOWN]
    shares = [f"{kind} {form} {ms / total:.0%}" for (kind, form), ms in largest]
    progress.say(f"profile of batch {batch_size}: {', '.join(shares)}")
    return {
        "batch_size": batch_size,
        "threads": options.threads,
        "operators": [_described(operator) for operator in ours],
        "fp32_backend": fp32_name,
        "fp32": [_described(operator) for operator in fp32],
    }


def _operators(backend: str, path: Path, experiment: Experiment) -> list[Timed] | None:
    """Time the operators of the file at `path` in a fresh process; None if they are unknown."""
    options = experiment.options
    runs = SMOKE_RUNS if options.smoke else RUNS
    with Worker(backend, path, options.device, options.threads) as worker:
        return worker.call("profile", experiment.data.test, options.batch_sizes[0], runs)


def _described(operator: Timed) -> dict:
    return dataclasses.asdict(operator) | {"kind": operator.kind}
