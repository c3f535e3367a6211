"""The images that are loaded, trained on and evaluated: files of two classes, drawn or taken from a user's folder."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from paired import Settings
from PIL import Image

from utils import architectures, cache, data, drawn, layouts
from utils.errors import UserError

architectures.torchvision_models()  # mends a torchvision that was built for another torch, before its datasets are imported
from torchvision.datasets.folder import IMG_EXTENSIONS

PHOTOGRAPH = (500, 375)  # pixels of the usual image of Kaggle's cats and dogs


def files(settings: Settings, count: int) -> Path:
    """A folder with `count` // 2 images in each of two class folders, which every loader of images can read."""
    root = settings.folder / "pictures"
    found = _taken(settings.data, count // 2) if settings.data else _drawn(count)
    for number, (label, suffix, content) in enumerate(found):
        path = root / ("cats", "dogs")[label] / f"{number:05d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _drawn(count: int) -> Iterator[tuple[int, str, bytes]]:
    for number in range(count):
        pixels, label = drawn.draw(data.DRAWN_SEED, number)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize(PHOTOGRAPH).save(stream, "JPEG", quality=90)
        yield label, ".jpg", stream.getvalue()


def _taken(folder: Path, each: int) -> Iterator[tuple[int, str, bytes]]:
    images = layouts.find(folder).images
    for label in (0, 1):
        chosen = list(islice(_usable(image for image in images if image.label == label), each))
        if len(chosen) < each:
            raise UserError(f"--data {folder}: {each} readable images of each class are needed.")
        yield from chosen


def _usable(images: Iterator[layouts.Image]) -> Iterator[tuple[int, str, bytes]]:
    """Those that torchvision can read as well: it passes over other suffixes and stops at a broken image."""
    for image in images:
        content = image.path.read_bytes()
        with contextlib.suppress(cache.BrokenImage):
            cache.decode(content)
            if image.path.suffix.lower() in IMG_EXTENSIONS:
                yield image.label, image.path.suffix, content


def cached(root: Path, directory: Path) -> data.Split:
    """All images below `root` as a script would have them, through a cache in `directory`."""
    with contextlib.redirect_stdout(None):  # its line about the images
        stored = cache.open_folder(layouts.find(root), directory)
    return data.Split(stored.images, stored.labels, stored.names, np.arange(len(stored.names)))


def prepared(settings: Settings, count: int) -> data.Split:
    """`count` images in a cache, the files gone."""
    root = files(settings, count)
    split = cached(root, settings.folder / "images")
    shutil.rmtree(root)
    return split


def as_data(split: data.Split) -> data.Data:
    """`split` in the place of all parts of a study."""
    return data.Data("benchmark", ("cat", "dog"), "0" * 64, split, split, split, 0)
