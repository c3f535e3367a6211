"""Benchmark of image loading: the cache against torchvision's ImageFolder.

ImageFolder's loader gets one process for each of our threads.
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
EPOCHS = 5  # in a turn of ours; one would end before the processor's caches are ours again
AUGMENT = RECIPE.pretrained.augment.describe()
# One affine resampling, as in ours: flips, rotations, and the enlargement that a crop causes.
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
    """Build the loader that users of torchvision would write."""
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
    """A turn of one epoch after the first, when the loader's processes are running already."""
    consume(loader)
    return paired.turn(lambda: consume(loader))


def first_pass(root: Path, folder: Path) -> paired.Turn:
    """A turn from the files to the last batch of the first epoch, without a cache to start from."""
    directory = folder / "first"
    work = paired.turn(lambda: consume(pictures.cached(root, directory).shuffled(BATCH, 0)))

    def turn() -> list[float]:
        seconds = work()
        shutil.rmtree(directory)
        return seconds

    return turn
