"""Augmentation and normalisation of a batch."""

import math

import pytest
import torch

from utils.data.augmentation import augment, normalize_


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalisation_by_hand(layout):
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    expected = torch.tensor([-0.485 / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    batch = images.clone(memory_format=layout)
    assert normalize_(batch) is batch  # in place
    assert torch.allclose(batch, expected.view(1, 3, 1, 1).expand(2, 3, 2, 2), atol=1e-6)


def augmented(images, crop, degrees, *uniform):
    """Augment by numbers from 0 to 1: side, angle, mirror (0 mirrors), shifts right and down."""
    return augment(
        images, torch.tensor([uniform] * len(images), dtype=torch.float32), crop, degrees
    )


def draws(n):
    """Return random numbers for `n` images."""
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def marked():
    """Two images without symmetry, whose pixels all differ."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_without_crop_and_rotation_half_of_the_images_are_mirrored(marked):
    images = marked[:1].expand(200, -1, -1, -1)
    result = augment(images, draws(len(images)), crop=1, degrees=0)
    same = (result - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (result - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert bool((same ^ mirrored).all())
    assert 70 <= int(mirrored.sum()) <= 130


def test_mirroring_is_left_to_right(marked):
    assert torch.allclose(augmented(marked, 1, 0, 0, 0, 0.0, 0, 0), marked.flip(3), atol=1e-4)
    assert torch.allclose(augmented(marked, 1, 0, 0, 0, 0.9, 0, 0), marked, atol=1e-4)


@pytest.mark.parametrize(("draw", "turns"), [(0.0, -1), (0.5, 0), (1.0, 1)])
def test_rotation_reaches_the_degrees_on_both_sides(marked, draw, turns):
    assert torch.allclose(
        augmented(marked, 1, 90, 0, draw, 0.9, 0, 0), marked.rot90(turns, (2, 3)), atol=1e-4
    )


def test_image_is_rotated_before_it_is_mirrored(marked):
    result = augmented(marked, 1, 90, 0, 1.0, 0.0, 0, 0)
    assert torch.allclose(result, marked.rot90(1, (2, 3)).flip(3), atol=1e-4)


def test_small_rotation_moves_a_mark_along_a_circle():
    image = torch.zeros(1, 3, 65, 65)
    image[:, :, 32, 52] = 1  # 20 to the right of the centre
    spot = augmented(image, 1, 30, 0, 1.0, 0.9, 0, 0)[0, 0]
    weight = spot / spot.sum()
    row = (weight.sum(1) * torch.arange(65)).sum() - 32
    column = (weight.sum(0) * torch.arange(65)).sum() - 32
    assert column.item() == pytest.approx(20 * math.cos(math.radians(30)), abs=0.2)
    assert abs(row.item()) == pytest.approx(20 * math.sin(math.radians(30)), abs=0.2)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_smallest_crop_reaches_each_corner(marked, right, down):
    result = augmented(marked, 0.5, 0, 0, 0, 0.9, right, down)
    corner = marked[:, :, 16 * down : 16 * down + 16, 16 * right : 16 * right + 16]
    enlarged = torch.nn.functional.interpolate(
        corner, scale_factor=2, mode="bilinear", align_corners=False
    )
    # Border pixels are interpolated with neighbours outside the corner.
    assert torch.allclose(result[:, :, 1:-1, 1:-1], enlarged[:, :, 1:-1, 1:-1], atol=1e-4)


def test_largest_crop_is_the_whole_image(marked):
    assert torch.allclose(augmented(marked, 0.5, 0, 1.0, 0, 0.9, 0.2, 0.7), marked, atol=1e-4)


def test_pixels_stay_in_the_range_of_their_image(marked):
    images = (0.3 + 0.4 * marked[:1]).expand(50, -1, -1, -1)
    result = augment(images, draws(len(images)), crop=0.6, degrees=45)
    assert result.shape == images.shape
    assert result.min() >= images.min() - 1e-5  # nothing is filled with black
    assert result.max() <= images.max() + 1e-5
    assert len({image.sum().item() for image in result}) == 50  # random numbers differ per image


def test_a_smaller_size_is_the_same_image_with_fewer_pixels(marked):
    numbers = draws(len(marked))
    smooth = torch.nn.functional.interpolate(
        marked[:, :, :8, :8], size=128, mode="bilinear", align_corners=False
    )
    whole, small = (augment(smooth, numbers, crop=0.6, degrees=20, size=size) for size in (128, 64))
    assert small.shape == (2, 3, 64, 64)
    assert torch.allclose(small, torch.nn.functional.avg_pool2d(whole, 2), atol=0.05)
