"""Times of single operators, reported by the engine that runs them.

Engines name and fuse operators differently, and measuring slows them down. These times explain a
latency; they do not replace it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.backends import torch_export
from utils.backends.base import Predictor

# What an operator is for, by a part of its name in lower case; the first match counts.
KINDS = {
    "reorder": r"reorder|transpose|permute|contiguous|copy|convert|cast|\bto\b|reshape|flatten"
    r"|quantize(linear|_per)|dequantize",
    "depthwise": r"depthwise|groupconv|dwconv",
    "convolution": r"conv",
    "linear": r"gemm|matmul|(?<!q)linear|addmm|fullyconnected|\bmm\b",
    "pooling": r"pool|mean|reduce",
    "normalisation": r"norm",
    "sum or product": r"add|mul|eltwise|subgraph",
    "activation": r"swish|sigmoid|relu|clip|clamp|math",
}
REST = "other"


@dataclass(frozen=True)
class Timed:
    """One operator of a network as its engine runs it."""

    name: str  # in the engine
    operator: str  # the engine's word for what it does
    format: str  # of its arithmetic: "INT8", "FP32", ...; "" if the engine does not say
    ms: float  # mean of its runs

    @property
    def kind(self) -> str:
        """What it is for: one of KINDS, or REST."""
        return kind_of(self.operator)


def kind_of(operator: str) -> str:
    """Return which of KINDS an engine's word for an operator belongs to, or REST."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, operator.lower()):
            return kind
    return REST


def of_torch(predict: Predictor, x: torch.Tensor, runs: int, format: str) -> list[Timed]:
    """Return the times of torch's operators while `predict` answers `x`, from torch's profiler.

    Integer operators have names like `quantized::...`; the others compute in `format`. Calls of one
    operator count together, because torch does not say which layer they belong to.
    """
    # The profiler prints when it starts and stops.
    with torch.inference_mode(), torch_export.quiet():
        predict(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(runs):
                predict(x)
    times = []
    for event in profile.key_averages():
        if event.self_cpu_time_total > 0:
            name, ms = event.key, event.self_cpu_time_total / 1e3 / runs
            times.append(Timed(name, name, "INT8" if "quantized" in name else format, ms))
    return times


class ByTorch:
    """The method `profile` of backends whose networks torch runs."""

    format = "FP32"  # of their operators, except integer ones

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> list[Timed]:
        """Return the times of the artifact's operators, means of `runs` answers to `x`."""
        predict = self.load(path, "cpu")
        return of_torch(predict, x.contiguous(memory_format=self.layout), runs, self.format)


def by_kind(operators: Iterable[Timed]) -> dict[tuple[str, str], float]:
    """Return the milliseconds for each kind and format, largest first."""
    sums: dict[tuple[str, str], float] = {}
    for operator in operators:
        key = operator.kind, operator.format
        sums[key] = sums.get(key, 0.0) + operator.ms
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
