"""Benchmark of image loading: the cache against torchvision's ImageFolder.

ImageFolder's loader has as many processes as the cache has threads.
"""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import paired
import pictures
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from models.resnet18_fp32 import RECIPE
from utils.data import augmentation

BATCH = 32
EPOCHS = 5  # per turn of the cache; a single one would end before the CPU's caches are warm
AUGMENT = RECIPE.pretrained.augment.describe()
# One affine resampling, as in `augment`: flips, rotations, and the enlargement by a crop.
AUGMENTED = [
    transforms.RandomHorizontalFlip(),
    transforms.RandomAffine(
        AUGMENT["degrees"],
        translate=(0.15, 0.15),
        scale=(1, 1 / AUGMENT["crop"]),
        interpolation=transforms.InterpolationMode.BILINEAR,
    ),
]


def data_loading(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time epochs of shuffled, normalised batches, and the first pass over the files."""
    torch.set_num_threads(paired.THREADS)
    count, rounds = (32, 1) if settings.smoke else (512, 10)
    root, seeds = pictures.files(settings, count), itertools.count()
    split = pictures.cached(root, settings.folder / "images")

    def epoch(settings: dict | None) -> paired.Turn:
        return paired.turn(
            lambda: consume(split.shuffled(BATCH, next(seeds), augmentation=settings)), EPOCHS
        )

    for what, ours, theirs in (("not augmented", None, []), ("augmented", AUGMENT, AUGMENTED)):
        what = f"second epoch, {what}, times faster than ImageFolder"
        yield paired.faster(what, epoch(ours), second_epoch(image_folder(root, theirs)), 8, rounds)
    yield paired.cost(
        "first pass, which fills the cache, over ImageFolder's",
        first_pass(root, settings.folder),
        paired.turn(lambda: consume(image_folder(root, []))),
        1.1,
        rounds,
    )


def consume(batches) -> None:
    for _ in batches:
        pass


def image_folder(root: Path, augmenting: list) -> DataLoader:
    """Build the loader that a user of torchvision would write."""
    steps = [
        transforms.Resize((224, 224)),
        *augmenting,
        transforms.ToTensor(),
        transforms.Normalize(augmentation.MEAN, augmentation.STD),
    ]
    images = ImageFolder(str(root), transforms.Compose(steps))
    return DataLoader(
        images,
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=paired.THREADS,
        persistent_workers=True,
    )


def second_epoch(loader: DataLoader) -> paired.Turn:
    """A turn of one later epoch, when the loader's processes are already running."""
    consume(loader)
    return paired.turn(lambda: consume(loader))


def first_pass(root: Path, folder: Path) -> paired.Turn:
    """A turn from the files to the last batch of the first epoch, without an existing cache."""
    directory = folder / "first"
    work = paired.turn(lambda: consume(pictures.cached(root, directory).shuffled(BATCH, 0)))

    def turn() -> list[float]:
        seconds = work()
        shutil.rmtree(directory)
        return seconds

    return turn
