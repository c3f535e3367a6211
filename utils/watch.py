"""Looking at the outputs of a network's layers while images run through it, by forward hooks."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

WEIGHTED = (nn.Conv2d, nn.Linear)


def _weighted(module: nn.Module) -> bool:
    """Convolutions and linear layers: float, packed, or (a kind of Sequential) kept in FP32 and fused with what follows."""
    fused = isinstance(module, nn.Sequential) and type(module).__module__.startswith("torch.ao.nn.intrinsic")
    return fused or isinstance(module, WEIGHTED) or callable(getattr(module, "weight", None))


@contextlib.contextmanager
def outputs(network: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Collect, while images run through `network`, the output of each weighted layer; in order of computation."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        found[name] = output.clone()  # activation functions may work in place

    with _hooked(network, _weighted, keep):
        yield found


@contextlib.contextmanager
def extremes(network: nn.Module) -> Iterator[dict]:
    """Watch every layer's output while images run through `network`: filled on leaving, for all of them together.

    `nonfinite`: how many values were infinite or not a number; `largest`: the largest finite magnitude, and `largest_in`, where.
    """
    seen: dict[str, torch.Tensor] = {}
    report: dict = {}

    def keep(name: str, output: torch.Tensor) -> None:
        finite = torch.isfinite(output)
        largest = torch.where(finite, output.float().abs(), 0.0).max()
        now = torch.stack([(~finite).sum().double(), largest.double()])
        old = seen.get(name, torch.zeros_like(now))
        seen[name] = torch.stack([old[0] + now[0], torch.maximum(old[1], now[1])])

    with _hooked(network, lambda module: not any(module.children()), keep):
        yield report
    worst = max(seen, key=lambda name: seen[name][1].item())
    total = sum(int(own[0]) for own in seen.values())
    report |= {"nonfinite": total, "largest": seen[worst][1].item(), "largest_in": worst}


@contextlib.contextmanager
def _hooked(network: nn.Module, wanted: Callable[[nn.Module], bool], keep: Callable) -> Iterator[None]:
    hooks = [
        module.register_forward_hook(lambda _module, _input, output, name=name: keep(name, output))
        for name, module in network.named_modules()
        if wanted(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
