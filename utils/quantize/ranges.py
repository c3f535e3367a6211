"""Calibration: run images through observers and choose ranges from their records."""

import numpy as np
import torch
from torch import nn

from utils import progress

BATCH = 32
BINS = 4096  # number of bins in a histogram of magnitudes
PERCENTILE = 99.999  # percentage of the magnitudes that "percentile" keeps
SILENT = 2.0**-10  # smallest range of a channel, relative to the largest in its tensor


@torch.no_grad()
def observe(prepared: nn.Module, images: torch.Tensor) -> None:
    """Run `images` (n, 3, 224, 224), normalised, through a model with observers, in order."""
    with progress.Bar("calibrating", len(images), "images") as bar:
        for batch in images.split(BATCH):
            prepared(batch)
            bar.step(len(batch))


class Magnitudes(nn.Module):
    """Observer of a tensor's magnitudes: first of their maximum, then of their histogram.

    The histogram extends from 0 to the maximum. All channels share one record, or, with
    `channelwise`, each has a separate one. The tensor passes unchanged.
    """

    def __init__(self):
        super().__init__()
        self.channelwise = False
        self.maximum: torch.Tensor | None = None  # float32 (rows,): one row, or one per channel
        self.counts: torch.Tensor | None = None  # float64 (rows, BINS), in the second pass
        self.shape: tuple[int, ...] = ()  # shape of a scale

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
        """Return the magnitude that becomes the largest integer of `bits` bits.

        `method` is one of LIMITS. The result is float32, shape () or (1, channels, 1, 1). A channel
        gets at least SILENT times the largest limit in its tensor, even if it is zero in all
        images. A tensor of zeros gets 1.
        """
        counts = [np.empty(0)] * len(self.maximum) if self.counts is None else self.counts.numpy()
        pairs = zip(counts, self.maximum.tolist(), strict=True)
        limits = torch.tensor([LIMITS[method](counts, maximum, bits) if maximum > 0 else 0.0 for counts, maximum in pairs])
        if not limits.any():
            return torch.ones_like(limits).reshape(self.shape)
        return torch.maximum(limits, SILENT * limits.max()).reshape(self.shape)


def magnitudes(model: nn.Module, images: torch.Tensor, method: str) -> dict[str, Magnitudes]:
    """Run `images` through the `Magnitudes` in `model` and return these observers by name.

    `images` are float32 (n, 3, 224, 224), normalised. They run twice, unless `method` of LIMITS is
    "minmax", which needs no histogram.
    """
    observers = {name: module for name, module in model.named_modules() if isinstance(module, Magnitudes)}
    observe(model, images)
    if method != "minmax":
        for observer in observers.values():
            observer.counts = torch.zeros(len(observer.maximum), BINS, dtype=torch.float64)
        observe(model, images)
    return observers


def minmax(counts: np.ndarray, maximum: float, bits: int) -> float:
    """Return `maximum`, so that nothing is clipped."""
    return maximum


def percentile(counts: np.ndarray, maximum: float, bits: int) -> float:
    """Return the bin edge below which PERCENTILE percent of the magnitudes lie."""
    share = np.cumsum(counts) / counts.sum()
    return float(maximum * (np.searchsorted(share, PERCENTILE / 100) + 1) / BINS)


def mse(counts: np.ndarray, maximum: float, bits: int) -> float:
    """Return the limit with the least squared error of clipping and rounding.

    Magnitudes above the limit are clipped to it. Rounding those below it has a mean squared error
    of step**2 / 12.
    """
    edges = maximum * np.arange(1, BINS + 1) / BINS
    centres = edges - maximum / (2 * BINS)
    step = edges / (2 ** (bits - 1) - 1)
    kept = np.cumsum(counts)
    # Sum of count * (centre - limit)^2 over the clipped bins, for all limits at once.
    above = [np.cumsum((counts * centres**power)[::-1])[::-1] - counts * centres**power for power in (0, 1, 2)]
    clipping = above[2] - 2 * edges * above[1] + edges**2 * above[0]
    return float(edges[np.argmin(clipping + kept * step**2 / 12)])


LIMITS = {"minmax": minmax, "percentile": percentile, "mse": mse}
