"""Benchmark of a training step: ours against the plain loop of PyTorch's tutorials."""

from collections.abc import Iterator

import paired
import pictures
import torch
import torch.nn.functional as F

from models.resnet18_fp32 import RECIPE
from utils.training import architectures
from utils.training.loop import Setup, Training

RATE = 1e-4


def training_step(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time ResNet-18 on one batch, which both sides have ready."""
    torch.set_num_threads(paired.THREADS)
    recipe = RECIPE["pretrained"] | ({"batch_size": 4} if settings.smoke else {})
    split = pictures.prepared(settings, 2 * recipe["batch_size"])
    torch.manual_seed(0)
    training = Training(architectures.build("resnet18"), pictures.as_data(split), recipe, Setup(set(), 0, "cpu"))
    training.network.train()
    x, y = next(split.shuffled(recipe["batch_size"], 0, augmentation=recipe["augment"]))
    ours, theirs = paired.turn(lambda: training.step(x, y)), paired.turn(plain(x.contiguous(), y))
    for turn in (ours, theirs):
        turn()  # allocates the optimizer's state
    what = f"training step, batch {len(x)}, {training.amp}, times faster than a plain loop"
    yield paired.faster(what, ours, theirs, 1.5, 1 if settings.smoke else 3)


def plain(x: torch.Tensor, y: torch.Tensor):
    """Make a plain step: FP32, contiguous, AdamW with its defaults, the same architecture."""
    model = architectures.build("resnet18").train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
