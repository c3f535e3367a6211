"""Calibration: showing images to observers, and choosing ranges from what they saw."""

import numpy as np
import torch
from scipy.special import rel_entr
from torch import nn

from utils import progress

BATCH = 32
BINS = 4096  # of a histogram of magnitudes
PERCENTILE = 99.999  # of magnitudes kept by "percentile"
SILENT = 2.0**-10  # least range of a channel, as a share of the largest of its tensor


@torch.no_grad()
def observe(prepared: nn.Module, images: torch.Tensor) -> None:
    """Run a model whose observers record ranges over `images` (n, 3, 224, 224), normalised, in their order."""
    with progress.Bar("calibrating", len(images), "images") as bar:
        for batch in images.split(BATCH):
            prepared(batch)
            bar.step(len(batch))


class Magnitudes(nn.Module):
    """Watches a tensor without changing it: how large its magnitudes get, and then their histogram up to there.

    All channels together, or each by itself with `channelwise`.
    """

    def __init__(self):
        super().__init__()
        self.channelwise = False
        self.maximum: torch.Tensor | None = None  # float32 (rows,): one row, or one for each channel
        self.counts: torch.Tensor | None = None  # float64 (rows, BINS) of the second pass
        self.shape: tuple[int, ...] = ()  # of a scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        magnitudes = (x.detach().abs().transpose(0, 1) if self.channelwise else x.detach().abs()[None]).flatten(1)
        if self.counts is None:
            self.shape = (1, -1, *[1] * (x.ndim - 2)) if self.channelwise else ()
            largest = magnitudes.amax(1)
            self.maximum = largest if self.maximum is None else torch.maximum(self.maximum, largest)
        else:
            rows = torch.arange(len(magnitudes))[:, None]
            width = self.maximum.clamp_min(torch.finfo(torch.float32).tiny)[:, None] / BINS
            bins = (magnitudes / width).long().clamp_(max=BINS - 1) + BINS * rows
            self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)
        return x

    def limit(self, method: str, bits: int) -> torch.Tensor:
        """The magnitude that becomes the largest integer of `bits` bits, by a method of LIMITS.

        float32, shape () or (1, channels, 1, 1). A channel that stays silent in all images gets a share of its tensor's range,
        and a tensor of zeros gets 1.
        """
        counts = [np.empty(0)] * len(self.maximum) if self.counts is None else self.counts.numpy()
        pairs = zip(counts, self.maximum.tolist(), strict=True)
        found = torch.tensor([LIMITS[method](counts, maximum, bits) if maximum > 0 else 0.0 for counts, maximum in pairs])
        if not found.any():
            return torch.ones_like(found).reshape(self.shape)
        return torch.maximum(found, SILENT * found.max()).reshape(self.shape)


def magnitudes(model: nn.Module, images: torch.Tensor, method: str) -> dict[str, Magnitudes]:
    """Show `images` (n, 3, 224, 224) to the `Magnitudes` in `model`, as `method` of LIMITS needs it; returns them by name."""
    watched = {name: module for name, module in model.named_modules() if isinstance(module, Magnitudes)}
    observe(model, images)
    if method != "minmax":
        for own in watched.values():
            own.counts = torch.zeros(len(own.maximum), BINS, dtype=torch.float64)
        observe(model, images)
    return watched


def minmax(counts: np.ndarray, maximum: float, bits: int) -> float:
    """Nothing is clipped."""
    return maximum


def percentile(counts: np.ndarray, maximum: float, bits: int) -> float:
    """The bin edge below which PERCENTILE of the magnitudes lie."""
    share = np.cumsum(counts) / counts.sum()
    return float(maximum * (np.searchsorted(share, PERCENTILE / 100) + 1) / BINS)


def mse(counts: np.ndarray, maximum: float, bits: int) -> float:
    """The limit with the least squared error, of clipping above it and of rounding (step squared over 12) below it."""
    edges = maximum * np.arange(1, BINS + 1) / BINS
    centres = edges - maximum / (2 * BINS)
    step = edges / (2 ** (bits - 1) - 1)
    kept = np.cumsum(counts)
    # sum over the clipped bins of count * (centre - limit)^2, for all limits at once
    above = [np.cumsum((counts * centres**power)[::-1])[::-1] - counts * centres**power for power in (0, 1, 2)]
    clipping = above[2] - 2 * edges * above[1] + edges**2 * above[0]
    return float(edges[np.argmin(clipping + kept * step**2 / 12)])


def entropy(counts: np.ndarray, maximum: float, bits: int) -> float:
    """The limit whose quantized histogram has the least KL divergence from the clipped one (Migacz, GTC 2017, for 8 bits).

    With at least as many levels as bins, as at 16 bits, quantization leaves the histogram as it is, and not clipping anything
    has no divergence at all.
    """
    if 2 ** (bits - 1) >= BINS:
        return maximum
    levels, best = 2 ** (bits - 1), (np.inf, BINS)
    for length in range(128, BINS + 1, 16):
        reference = counts[:length].copy()
        reference[-1] += counts[length:].sum()
        group = np.arange(length) * min(levels, length) // length
        filled = counts[:length] > 0
        total, members = np.bincount(group, counts[:length]), np.maximum(1, np.bincount(group, filled))
        quantized = np.where(filled, (total / members)[group], 0)
        p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1)
        best = min(best, (rel_entr(p, np.maximum(q, 1e-12)).sum(), length), key=lambda pair: (pair[0], -pair[1]))
    return float(maximum * best[1] / BINS)


LIMITS = {"minmax": minmax, "percentile": percentile, "mse": mse, "entropy": entropy}
