"""Weighted layers of a network, and contexts that watch the outputs of layers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

WEIGHTED = (nn.Conv2d, nn.Linear)


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers of a model by name, in definition order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def is_depthwise(module: nn.Module | None) -> bool:
    """Return whether `module` is a convolution with one filter per channel."""
    return (
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels
    )


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the blocks of `model`, in the order of their definition.

    In the study's networks, this is also the order of computation. A block is a child of the model
    that contains a convolution or linear layer. A plain `nn.Sequential` is not a block, but its
    children are. Subclasses of `nn.Sequential` are blocks. Every convolution or linear layer is in
    exactly one block.
    """
    names = []
    for name, child in model.named_children():
        if type(child) is nn.Sequential:
            names.extend(f"{name}.{inner}" for inner in blocks(child))
        elif any(isinstance(module, WEIGHTED) for module in child.modules()):
            names.append(name)
    return tuple(names)


@contextlib.contextmanager
def watching(
    modules: Iterable[tuple[str, nn.Module]], look: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call `look(name, output)` on every output of the named `modules` inside this context."""

    def hook(name: str):
        return lambda _module, _inputs, output: look(name, output)

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextlib.contextmanager
def outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the latest outputs of `modules` while images run through their network.

    The yielded dict is in the order of computation. Quantized outputs are dequantized to float32.
    The others are copied, because activation functions may work in place.
    """
    latest: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        latest[name] = output.dequantize() if output.is_quantized else output.clone()

    with watching(modules.items(), keep):
        yield latest


@contextlib.contextmanager
def extremes(network: nn.Module) -> Iterator[dict]:
    """Report the extreme values in the layers of `network` while images run through it.

    The yielded dict is filled when the context ends. `nonfinite` is the number of infinite values
    and NaN, `largest` the largest finite magnitude, `largest_in` the layer where it occurred.
    """
    worst: dict[str, torch.Tensor] = {}  # float64 (2,): non-finite values, largest finite magnitude
    report: dict = {}

    def look(name: str, output: torch.Tensor) -> None:
        finite = torch.isfinite(output)
        largest = torch.where(finite, output.float().abs(), 0.0).max()
        now = torch.stack([(~finite).sum().double(), largest.double()])
        before = worst.get(name, torch.zeros_like(now))
        worst[name] = torch.stack([before[0] + now[0], torch.maximum(before[1], now[1])])

    leaves = [
        (name, module) for name, module in network.named_modules() if not any(module.children())
    ]
    with watching(leaves, look):
        yield report
    where = max(worst, key=lambda name: worst[name][1].item())
    nonfinite = sum(int(counts[0]) for counts in worst.values())
    report |= {"nonfinite": nonfinite, "largest": worst[where][1].item(), "largest_in": where}


@torch.no_grad()
def channel_moments(
    network: nn.Module, batches: Iterable[torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the channel means and standard deviations of the outputs of all weighted layers.

    They are taken over images and positions while `batches`, float32 (n, 3, 224, 224), run through
    `network`, before the activation functions: float32 (channels,) each, by layer.
    """
    sums: dict[str, torch.Tensor] = {}  # float64 (2, channels), of values and of squares
    count = 0

    def add(name: str, output: torch.Tensor) -> None:
        means = torch.stack([mean_by_channel(output), mean_by_channel(output.square())])
        sums[name] = sums.get(name, 0) + means.double() * len(output)

    with watching(weighted(network).items(), add):
        for batch in batches:
            network(batch)
            count += len(batch)
    moments = {name: total / count for name, total in sums.items()}
    return {
        name: (mean.float(), (square - mean.square()).clamp_min(0).sqrt().float())
        for name, (mean, square) in moments.items()
    }


def mean_by_channel(output: torch.Tensor) -> torch.Tensor:
    """Return the mean over images and positions of (n, channels) or (n, channels, h, w)."""
    return output.mean(dim=[dim for dim in range(output.ndim) if dim != 1])
