"""Augmentation and normalisation: from the pixels of a batch to the network's input."""

import math

import torch
import torch.nn.functional as F

# ImageNet's statistics, which torchvision's weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize_(images: torch.Tensor) -> torch.Tensor:
    """Normalise images, float (n, 3, h, w) in [0, 1], by ImageNet's statistics; return them.

    The images change in place, because a copy would take as long as the arithmetic.
    """
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    if not images.is_contiguous(memory_format=torch.channels_last):
        return images.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))
    # On channels-last images, torch would loop over 3 numbers at a time. Rows are 10 times as fast.
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

    A single affine resampling interpolates each pixel once. The crop lies anywhere in the image,
    with a side of `crop` to 1 times the image's side. The rotation is uniform within +-`degrees`.
    Half of the images are mirrored. `uniform`, float32 (n, 5) in [0, 1) on the CPU, holds all
    random numbers. Reflection fills the area outside the image.
    """
    side = crop + (1 - crop) * uniform[:, 0]
    angle = math.radians(degrees) * (2 * uniform[:, 1] - 1)
    mirror = torch.where(uniform[:, 2] < 0.5, -1.0, 1.0)
    shift = (2 * uniform[:, 3:] - 1) * (1 - side)[:, None]
    cos, sin = side * angle.cos(), side * angle.sin()
    # The position of each result pixel in the image, whose sides go from -1 to 1. `F.affine_grid`
    # computes a matrix product per pixel, which takes as long as the resampling.
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
