"""Calibration: images are shown once and in order, and ranges follow from the histograms by each method."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.quantize import ranges


def test_calibration_shows_each_image_once_in_order_without_gradients():
    seen = []

    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            assert not torch.is_grad_enabled()

    images = torch.randn(70, 3, 4, 4)
    ranges.observe(Recorder(), images)
    assert len(seen) == 3 and torch.equal(torch.cat(seen), images)


def counts_of(values, maximum):
    return np.histogram(values, ranges.BINS, (0, maximum))[0].astype(float)


@pytest.mark.parametrize("method", ranges.LIMITS)
def test_16_bits_hardly_clip_by_any_method(method):
    values = np.abs(np.random.default_rng(0).standard_normal(200_000))
    limit = ranges.LIMITS[method](counts_of(values, values.max()), values.max(), 16)
    assert 0.85 * values.max() <= limit <= values.max()


def test_mse_finds_the_limit_that_really_has_the_least_error_at_4_bits():
    values = np.abs(np.random.default_rng(0).laplace(size=100_000))
    limit_of_mse = ranges.mse(counts_of(values, values.max()), values.max(), 4)

    def error(limit):
        step = limit / 7
        return np.square(values - np.clip(np.rint(values / step), 0, 7) * step).mean()

    best = min(error(limit) for limit in np.linspace(0.05, 1, 200) * values.max())
    assert error(limit_of_mse) < 1.03 * best
    assert error(limit_of_mse) < 0.5 * error(values.max())


def test_percentile_keeps_its_share():
    values = np.arange(1_000_000) / 1_000_000
    counts = counts_of(values, 1.0)
    # uniform: the limit is the percentile itself, to a bin
    assert ranges.percentile(counts, 1.0, 8) == pytest.approx(ranges.PERCENTILE / 100, abs=1 / ranges.BINS)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_lone_outlier_is_clipped_as_the_methods_say(bits):
    # Of n values one is 100. Clipping at c costs (100 - c)^2 there, rounding the others n (c / largest)^2 / 12. Together that is
    # least where 100 - c = n c / (12 largest^2).
    values = np.concatenate([np.abs(np.random.default_rng(0).standard_normal(200_000)), [100.0]])
    counts, largest = counts_of(values, 100.0), 2 ** (bits - 1) - 1
    assert ranges.minmax(counts, 100.0, bits) == 100.0
    assert ranges.mse(counts, 100.0, bits) == pytest.approx(100 / (1 + len(values) / (12 * largest**2)), abs=100 / ranges.BINS)
    assert ranges.percentile(counts, 100.0, bits) < 6


def test_there_are_three_methods_and_a_recipe_names_one_of_them():
    assert set(ranges.LIMITS) == {"minmax", "percentile", "mse"}


def test_magnitudes_are_counted_over_all_batches():
    watched = ranges.Magnitudes()
    images = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ranges.magnitudes(nn.Sequential(watched), images, "mse")
    assert watched.maximum.tolist() == [images.abs().max().item()]
    expected = np.histogram(images.abs().numpy(), ranges.BINS, (0, watched.maximum.item()))[0]
    assert watched.counts.sum() == images.numel()
    assert np.abs(watched.counts[0].numpy() - expected).sum() <= 8  # values on an edge


def test_magnitudes_are_counted_for_each_channel():
    watched = ranges.Magnitudes()
    watched.channelwise = True
    images = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 1e-6]).view(1, 3, 1, 1)
    ranges.magnitudes(nn.Sequential(watched), images, "mse")
    for channel in range(3):
        values = images[:, channel].abs()
        assert watched.maximum[channel] == values.max()
        expected = np.histogram(values.numpy(), ranges.BINS, (0, values.max().item()))[0]
        assert np.abs(watched.counts[channel].numpy() - expected).sum() <= 8
    limit = watched.limit("minmax", 16)
    assert limit.shape == (1, 3, 1, 1)
    largest = watched.maximum[1].item()
    expected = [watched.maximum[0].item(), largest, largest * ranges.SILENT]  # nearly silent: it may wake up later
    assert limit.flatten().tolist() == pytest.approx(expected)


def test_a_tensor_of_zeros_has_a_range():
    watched = ranges.Magnitudes()
    ranges.magnitudes(nn.Sequential(watched), torch.zeros(4, 3, 8, 8), "mse")
    assert watched.limit("mse", 16) == 1.0
