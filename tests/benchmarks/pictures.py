"""Images for the benchmarks: files of two classes, drawn or taken from a user's folder."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from paired import Settings
from PIL import Image

from utils import architectures
from utils.data import cache, decoding, layouts, loading, synthetic
from utils.data.dataset import Data, Split
from utils.errors import UserError

# Repair a torchvision that was built for another torch before importing its datasets.
architectures.torchvision_models()
from torchvision.datasets.folder import IMG_EXTENSIONS

PHOTOGRAPH = (500, 375)  # usual size of Kaggle's cats and dogs, in pixels


def files(settings: Settings, count: int) -> Path:
    """Write `count` // 2 images into each of two class folders, and return their root.

    Any image loader can read them.
    """
    root = settings.folder / "pictures"
    images = _taken(settings.data, count // 2) if settings.data else _synthetic(count)
    for number, (label, suffix, content) in enumerate(images):
        path = root / ("cats", "dogs")[label] / f"{number:05d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _synthetic(count: int) -> Iterator[tuple[int, str, bytes]]:
    for number in range(count):
        pixels, label = synthetic.draw(loading.SYNTHETIC_SEED, number)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize(PHOTOGRAPH).save(stream, "JPEG", quality=90)
        yield label, ".jpg", stream.getvalue()


def _taken(folder: Path, wanted: int) -> Iterator[tuple[int, str, bytes]]:
    images = layouts.find(folder).images
    for label in (0, 1):
        chosen = list(islice(_usable(image for image in images if image.label == label), wanted))
        if len(chosen) < wanted:
            raise UserError(
                f"--data {folder}: too few images. "
                f"Give a folder with at least {wanted} readable ones of each class."
            )
        yield from chosen


def _usable(images: Iterator[layouts.Image]) -> Iterator[tuple[int, str, bytes]]:
    """Yield the images that torchvision can read as well.

    It ignores unknown suffixes and fails on a broken image.
    """
    for image in images:
        content = image.path.read_bytes()
        with contextlib.suppress(decoding.BrokenImage):
            decoding.decode(content)
            if image.path.suffix.lower() in IMG_EXTENSIONS:
                yield image.label, image.path.suffix, content


def cached(root: Path, directory: Path) -> Split:
    """Load all images below `root` as a script does, through a cache in `directory`."""
    stored = cache.identify_folder(layouts.find(root), directory).open()
    return Split(stored.images, stored.labels, stored.names, np.arange(len(stored.names)))


def prepared(settings: Settings, count: int) -> Split:
    """Cache `count` images and delete their files."""
    root = files(settings, count)
    split = cached(root, settings.folder / "images")
    shutil.rmtree(root)
    return split


def as_data(split: Split) -> Data:
    """Make a study in which every part is `split`."""
    return Data("benchmark", ("cat", "dog"), "0" * 64, split, split, split, 0)
