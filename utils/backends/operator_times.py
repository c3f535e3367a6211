"""Times of single operators, as the engine that runs them reports them.

Engines name operators differently, fuse them differently, and measuring slows them down, so these
times explain a latency and do not replace it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.backends import torch_export
from utils.backends.base import Predictor

# What an operator is for, by a part of its name, in lower case; the first that fits counts.
KINDS = {
    "reorder": r"reorder|transpose|permute|contiguous|copy|convert|cast|\bto\b|reshape|flatten|quantize(linear|_per)|dequantize",
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

    name: str  # that the engine gives it
    operator: str  # the engine's word for what it does
    format: str  # that it computes in: "INT8", "FP32", ...; "" if the engine does not say
    ms: float  # mean of its runs

    @property
    def kind(self) -> str:
        """What it is for: one of KINDS, or REST."""
        return kind_of(self.operator)


def kind_of(operator: str) -> str:
    """Return which of KINDS an engine's word for an operator belongs to; REST if to none."""
    return next(
        (kind for kind, pattern in KINDS.items() if re.search(pattern, operator.lower())), REST
    )


def of_torch(predict: Predictor, x: torch.Tensor, runs: int, format: str) -> list[Timed]:
    """Return the times of torch's operators while `predict` answers `x`, by torch's profiler.

    Integer operators are told by their name, `quantized::...`; the others compute in `format`.
    Calls of one operator count together, because torch does not say which layer they belong to.
    """
    with (
        torch.inference_mode(),
        torch_export.quiet(),
    ):  # the profiler prints when it starts and stops
        predict(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(runs):
                predict(x)
    events = [event for event in profile.key_averages() if event.self_cpu_time_total > 0]
    return [
        Timed(
            event.key,
            event.key,
            "INT8" if "quantized" in event.key else format,
            event.self_cpu_time_total / 1e3 / runs,
        )
        for event in events
    ]


class ByTorch:
    """The role *profile* of backends whose networks torch runs."""

    format = "FP32"  # that their operators compute in, but for integer ones

    def profile(self, path: Path, x: torch.Tensor, runs: int) -> list[Timed]:
        """Return the times of the operators of the artifact at `path`, means of `runs` answers to `x`."""
        return of_torch(
            self.load(path, "cpu"), x.contiguous(memory_format=self.layout), runs, self.format
        )


def by_kind(operators: Iterable[Timed]) -> dict[tuple[str, str], float]:
    """Return the milliseconds of each kind in each format, largest first."""
    sums: dict[tuple[str, str], float] = {}
    for each in operators:
        sums[each.kind, each.format] = sums.get((each.kind, each.format), 0.0) + each.ms
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
