"""Showing calibration images to observers."""

import torch
from torch import nn

from utils import progress

BATCH = 32


@torch.no_grad()
def observe(prepared: nn.Module, images: torch.Tensor) -> None:
    """Run a model whose observers record ranges over `images` (n, 3, 224, 224), normalised, in their order."""
    with progress.Bar("calibrating", len(images), "images") as bar:
        for batch in images.split(BATCH):
            prepared(batch)
            bar.step(len(batch))
