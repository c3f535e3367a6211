"""Calibration: run images through the float network, choose the range of every activation."""

import copy

import numpy as np
import torch
from torch import nn

from utils import progress
from utils.errors import UserError
from utils.quantize import insertion
from utils.quantize.qdq_config import INTEGERS, QDQConfig
from utils.recipes import Int8, Int16

BATCH = 32
BINS = 2048  # of a histogram
SHARES = np.linspace(0.01, 1, 100)  # of the calibrated ends, tried by "mse"
PERCENTILE = 99.999  # percentage of the values that "percentile" keeps
# Largest factor by which steps may grow to make a range symmetric: 1.11 for images, 2 after ReLU.
NEARLY = 1.25
SILENT = 2.0**-10  # smallest range of a channel, relative to the largest in its tensor


@torch.no_grad()
def observe(network: nn.Module, images: torch.Tensor) -> None:
    """Run `images` (n, 3, 224, 224), normalised, through a network with observers, in order."""
    with progress.Bar("calibrating", len(images), "images") as bar:
        for batch in images.split(BATCH):
            network(batch)
            bar.step(len(batch))


def fill(
    network: nn.Module, observers: dict[str, "Observer"], images: torch.Tensor, method: str
) -> None:
    """Run `images` through a `network` with `observers`, twice unless `method` is "minmax".

    Raises `UserError` with the name of the first observer that meets an infinite value or NaN.
    """
    observe(network, images)
    for name, observer in observers.items():
        if not torch.isfinite(observer.high - observer.low).all():
            raise UserError(
                "calibration: the FP32 network gives infinite values or NaN at "
                f"{name}; train it again."
            )
    if method != "minmax":
        for observer in observers.values():
            observer.counts = torch.zeros(len(observer.low), BINS, dtype=torch.float64)
        observe(network, images)


class Observer(nn.Module):
    """A record of a tensor's values: first their ends, then their histogram between the ends.

    The record has one row for all channels, or one per channel if `channelwise` is set. Values
    beyond the ends `useful` count as these ends. The tensor passes unchanged.
    """

    def __init__(self):
        super().__init__()
        self.channelwise = False
        self.useful: tuple[torch.Tensor, torch.Tensor] | None = None  # see `operators.Graph.useful`
        self.low: torch.Tensor | None = None  # float32 (rows,), at most 0
        self.high: torch.Tensor | None = None  # float32 (rows,), at least 0
        self.counts: torch.Tensor | None = None  # float64 (rows, BINS), in the second pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.detach().clamp(*self.useful) if self.useful else x.detach()
        rows = (values.transpose(0, 1) if self.channelwise else values[None]).flatten(1)
        if self.counts is not None:
            ends = self.low.tolist(), self.high.tolist()
            for counts, row, low, high in zip(self.counts, rows, *ends, strict=True):
                if low < high:
                    counts += torch.histc(row, BINS, low, high)
            return x
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        return x

    def range(self, method: str, config: QDQConfig) -> tuple[np.ndarray, np.ndarray]:
        """Return the low and the high end of the range, float64 (rows,) each.

        `method` is a key of RANGES. If zero-points are 0, the ends are equal in magnitude. A row
        gets at least SILENT times the widest range of the tensor, even if it is zero in all images.
        A tensor of zeros gets 1.
        """
        counts = [None] * len(self.low) if self.counts is None else self.counts.numpy()
        ends = zip(counts, self.low.double().tolist(), self.high.double().tolist(), strict=True)
        low, high = np.array([RANGES[method](*row, config) for row in ends]).T
        if config.symmetric:
            high = np.maximum(-low, high)
            low = -high
        if not (high - low).any():
            return (-np.ones_like(high) if config.symmetric else low), np.ones_like(high)
        scarce = (high - low) < SILENT * (high - low).max()
        widest = np.argmax(high - low)
        lower = np.minimum(SILENT * low[widest], low)
        upper = np.maximum(SILENT * high[widest], high)
        return np.where(scarce, lower, low), np.where(scarce, upper, high)


def minmax(
    counts: np.ndarray | None, low: float, high: float, config: QDQConfig
) -> tuple[float, float]:
    """Return the ends of all values: nothing is clipped."""
    return low, high


def percentile(
    counts: np.ndarray, low: float, high: float, config: QDQConfig
) -> tuple[float, float]:
    """Return the bin edges between which PERCENTILE percent of the values lie.

    Half of the rest lies beyond each end, or all of it beyond one end if the other is 0.
    """
    rest = (1 - PERCENTILE / 100) * counts.sum() / (1 if 0 in (low, high) else 2)
    edges = np.linspace(low, high, BINS + 1)
    upper = edges[BINS - np.searchsorted(np.cumsum(counts[::-1]), rest, side="right")]
    lower = edges[np.searchsorted(np.cumsum(counts), rest, side="right")]
    return (min(lower, 0.0) if low < 0 else low), (max(upper, 0.0) if high > 0 else high)


def mse(counts: np.ndarray, low: float, high: float, config: QDQConfig) -> tuple[float, float]:
    """Return the range with the least squared error of clipping and rounding.

    Both ends are tried at 100 shares of their calibrated values. Values beyond an end are clipped
    to it. Values within half a step of 0 become 0: after ReLU, most values are 0, which is exact.
    The mean squared error of rounding the others is step**2 / 12.
    """
    edges = np.linspace(low, high, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    lows, highs, step = _candidates(low, high, config)
    # Sums of counts, values and squares below every edge give the clipping error of any end.
    sums = [np.concatenate([[0], np.cumsum(counts * centres**power)]) for power in (0, 1, 2)]
    below, beyond = np.searchsorted(centres, lows), np.searchsorted(centres, highs, side="right")
    zeros = (
        np.searchsorted(centres, np.maximum(-step / 2, lows)),
        np.searchsorted(centres, np.minimum(step / 2, highs), side="right"),
    )
    clipped = _squares([total[below] for total in sums], lows)
    clipped = clipped + _squares([total[-1] - total[beyond] for total in sums], highs)
    count, _, near = (total[zeros[1]] - total[zeros[0]] for total in sums)
    rounded = sums[0][beyond] - sums[0][below] - count
    error = clipped + near + rounded * step**2 / 12
    best = np.unravel_index(np.argmin(error), error.shape)
    return (
        float(np.broadcast_to(lows, error.shape)[best]),
        float(np.broadcast_to(highs, error.shape)[best]),
    )


def _candidates(
    low: float, high: float, config: QDQConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return low ends, high ends and the steps between integers, which broadcast together."""
    if config.symmetric:
        limits = SHARES * max(-low, high)
        return -limits, limits, limits / INTEGERS[config.activation][1]
    # An end at 0, as in most channels after ReLU, leaves only the other one to choose.
    lows = (SHARES if low else SHARES[:1]) * low
    highs = (SHARES if high else SHARES[:1]) * high
    lows, highs = lows[:, None], highs[None, :]
    return lows, highs, (highs - lows) / config.steps


def _squares(sums: list[np.ndarray], ends: np.ndarray) -> np.ndarray:
    """Return the squared error of clipping values to `ends`.

    `sums` are the number of the values, their sum, and the sum of their squares.
    """
    count, first, second = sums
    return second - 2 * ends * first + ends**2 * count


RANGES = {"minmax": minmax, "percentile": percentile, "mse": mse}


def numbers(
    low: np.ndarray, high: np.ndarray, config: QDQConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and zero-points of ranges from `low` to `high`, float64 (rows,) each.

    They are float32 and int64, (rows,), or () for a single row. 0 is always one of the values. If
    `config` is `centred`, a single row gets the middle integer as its zero-point, if its steps grow
    by at most the factor NEARLY. Engines can store such a tensor as signed integers with zero-point
    0, which is faster.
    """
    lowest, highest = INTEGERS[config.activation]
    if config.symmetric:
        scale, zero_point = high / highest, np.zeros_like(high)
    else:
        scale = (high - low) / config.steps
        zero_point = lowest + np.clip(np.round(-low / scale), 0, config.steps)
        below = config.middle - lowest  # integers below the middle; there is one fewer above it
        around = np.maximum(-low / below, high / (below - 1))
        if config.centred and len(low) == 1 and around <= NEARLY * scale:
            scale, zero_point = around, np.full_like(zero_point, config.middle)
    shape = () if len(low) == 1 else (-1,)
    # The scale of a range of denormal numbers would be 0 in float32.
    scale = torch.from_numpy(np.maximum(scale, np.finfo(np.float32).tiny)).float()
    return scale.reshape(shape), torch.from_numpy(zero_point).long().reshape(shape)


def calibrate(
    network: nn.Module,
    images: torch.Tensor,
    config: QDQConfig,
    recipe: Int8 | Int16,
    equalized: frozenset[str] = frozenset(),
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the scale and zero-point of every Q/DQ pair of `network`, by the pair's name.

    `network` is float, with BatchNorm folded. It is not changed. `images`, float32
    (n, 3, 224, 224) normalised, run twice unless the ranges are "minmax". `equalized` is as for
    `insertion.insert`.
    """
    observed = copy.deepcopy(network)
    qdqs = insertion.insert(observed, config, recipe.keep_fp32, lambda _: Observer(), equalized)
    observers = {name: observed.get_submodule(name) for name in qdqs.source}
    for name, observer in observers.items():
        observer.channelwise, observer.useful = name in qdqs.channelwise, qdqs.useful[name]
    fill(observed, observers, images, recipe.ranges)
    chosen = {}
    leading_first = sorted(qdqs.source, key=lambda name: name in qdqs.same_as)
    for name in leading_first:
        if name in qdqs.same_as:
            chosen[name] = chosen[qdqs.same_as[name]]
        elif name in qdqs.gates:
            chosen[name] = torch.tensor(1 / 256), torch.tensor(INTEGERS[config.activation][0])
        else:
            low, high = observers[name].range(recipe.ranges, config)
            chosen[name] = numbers(recipe.headroom * low, recipe.headroom * high, config)
    return chosen
