"""Augmentation and normalisation: the steps between the pixels of a batch and a network."""

import math

import torch
import torch.nn.functional as F

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet; torchvision's weights expect them


def normalize_(images: torch.Tensor) -> torch.Tensor:
    """Normalise images, float (n, 3, h, w) in [0, 1], by ImageNet's statistics; return them.

    This happens in place, since a copy would cost as much as the arithmetic.
    """
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    if not images.is_contiguous(memory_format=torch.channels_last):
        return images.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))
    # Channels last, torch would loop over 3 numbers at a time; whole rows take a tenth of the time.
    width = images.shape[3]
    images.permute(0, 2, 3, 1).flatten(2).sub_(mean.repeat(width)).div_(std.repeat(width))
    return images


def augment(
    images: torch.Tensor,
    uniform: torch.Tensor,
    crop: float,
    degrees: float,
    size: int | None = None,
) -> torch.Tensor:
    """Return randomly cropped, mirrored and rotated copies of `images`, float (n, 3, h, w).

    They have the size of `images`, or `size` x `size` pixels.

    One affine resampling does it all, so pixels are interpolated once. The side of a crop is
    between `crop` and 1 times that of the image, anywhere inside; the rotation is uniform within
    +-`degrees`; half of the images are mirrored. `uniform`, float32 (n, 5) in [0, 1) on the CPU,
    holds all random numbers. Reflection fills what lies outside the image.
    """
    side = crop + (1 - crop) * uniform[:, 0]
    angle = math.radians(degrees) * (2 * uniform[:, 1] - 1)
    mirror = torch.where(uniform[:, 2] < 0.5, -1.0, 1.0)
    shift = (2 * uniform[:, 3:] - 1) * (1 - side)[:, None]
    cos, sin = side * angle.cos(), side * angle.sin()
    # Where each pixel of the result lies in the image, whose side goes from -1 to 1.
    # `F.affine_grid` has a matrix product for each pixel, which takes as long as the resampling.
    height, width = images.shape[2:] if size is None else (size, size)
    across, down = (((2 * torch.arange(n) + 1) / n - 1).to(images.device) for n in (width, height))
    grid = torch.empty(len(images), height, width, 2, device=images.device)
    for axis, (by_x, by_y) in enumerate([(cos * mirror, -sin), (sin * mirror, cos)]):
        by_x, by_y, offset = (
            values.to(images.device)[:, None] for values in (by_x, by_y, shift[:, axis])
        )
        torch.add((by_x * across)[:, None], (by_y * down + offset)[..., None], out=grid[..., axis])
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
