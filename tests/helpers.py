"""What several tests share: splits over a small memory-mapped array, as `utils.cache` would have made them, only smaller."""

import numpy as np

from utils.data import Data, Split


def split_of(folder, pixels, labels, names=None, index=None) -> Split:
    """A split over `pixels`, uint8 (n, h, w, 3), stored in `folder`; all of them unless `index` says which."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "images.npy"
    np.save(file, pixels)
    names = tuple(names or (f"{number}.jpg" for number in range(len(pixels))))
    index = np.arange(len(pixels)) if index is None else np.asarray(index)
    return Split(np.load(file, mmap_mode="r"), np.asarray(labels, np.int64), names, index.astype(np.int64))


def numbered_split(folder, labels, index=None, side=4) -> Split:
    """A split whose image `i` is of the one colour `i`, so that a batch tells which images it holds: see `numbers`."""
    count = len(labels)
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, 3))
    return split_of(folder, pixels, labels, index=index)


def bright_and_dark(folder, count=48, side=16, seed=0) -> Data:
    """Data that a tiny network can learn: noise around a darker grey (class 0) and around a lighter one (class 1)."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % 2)
    pixels = generator.integers(0, 200, (count, side, side, 3)) + 50 * labels[:, None, None, None]
    whole = split_of(folder, pixels.astype(np.uint8), labels)
    parts = np.split(np.arange(count), [count // 2, 3 * count // 4])
    train, validation, test = (Split(whole.images, whole.labels, whole.names, part) for part in parts)
    return Data("tiny", ("dark", "light"), "0" * 64, train, validation, test, 0)
