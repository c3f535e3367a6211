"""Test images that are also, nearly, among the images to learn from. No torch.

A perceptual hash proposes pairs, and the correlation of their pixels confirms them. On the 2,000
test and 8,000 other photographs of the dissertation, two pairs have the distance 0 and a
correlation of 0.998; no other pair with a distance of at most 12 has more than 0.80. In 1,000 drawn
test images there is no pair above 0.79.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import checksums, environment
from utils.errors import UserError

THUMBNAIL, LOW = 32, 8  # pixels of a side, and frequencies of a side that the hash keeps
FARTHEST = 12  # bits of 63 in which the hashes of a proposed pair may differ
ALIKE = 0.95  # correlation of the thumbnails of a confirmed pair
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
BLOCK = 256  # images in memory at a time


class NearDuplicate(NamedTuple):
    """A test image, the image to learn from that it resembles most, and their correlation."""

    test: str
    other: str
    correlation: float


def find(images: np.ndarray, tested: np.ndarray, others: np.ndarray) -> list[tuple]:
    """Find the images of `tested` that are also, nearly, among `others`; mirror images count.

    `images` are uint8 (n, 224, 224, 3), `tested` and `others` indices into them. Returns (index of
    the test image, index of the most similar other image, correlation of both), by test image.
    """
    ours, theirs = thumbnails(images, tested), thumbnails(images, others)
    hashes, best = perceptual(theirs), {}
    for view in (ours, ours[:, :, ::-1]):
        for start in range(0, len(view), BLOCK):
            part = view[start : start + BLOCK]
            distance = np.bitwise_count(perceptual(part)[:, None] ^ hashes[None])
            for row, column in zip(*np.nonzero(distance <= FARTHEST), strict=True):
                alike = correlation(part[row], theirs[column])
                known = best.get(start + row, (0, 0.0))
                if alike >= ALIKE and alike > known[1]:
                    best[start + row] = column, alike
    return [
        (int(tested[row]), int(others[column]), round(alike, 4))
        for row, (column, alike) in sorted(best.items())
    ]


def thumbnails(images: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Shrink images to grey means over squares, float32 (len(index), 32, 32)."""
    small = np.empty((len(index), THUMBNAIL, THUMBNAIL), np.float32)
    for start in range(0, len(index), BLOCK):
        grey = images[index[start : start + BLOCK]].astype(np.float32) @ LUMA
        side = grey.shape[1] // THUMBNAIL
        squares = grey.reshape(-1, THUMBNAIL, side, THUMBNAIL, side)
        small[start : start + BLOCK] = squares.mean((2, 4))
    return small


def perceptual(small: np.ndarray) -> np.ndarray:
    """Hash thumbnails by the signs of their low frequencies, uint64 (n,).

    This is the pHash: of the discrete cosine transform, the 63 lowest coefficients without the mean
    are compared with their median (Zauner 2010, "Implementation and Benchmarking of Perceptual
    Image Hash Functions", section 3.2.1).
    """
    from scipy.fft import dctn  # slow to import

    low = dctn(small, axes=(1, 2))[:, :LOW, :LOW].reshape(len(small), -1)[:, 1:]
    bits = low > np.median(low, axis=1, keepdims=True)
    padded = np.pad(bits, ((0, 0), (1, 0)))
    return np.packbits(padded, axis=1).view(np.uint64)[:, 0]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the pixels of two thumbnails; 0 if one has a single colour."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def of_source(stored, index: dict[str, np.ndarray], folder: Path) -> tuple[NearDuplicate, ...]:
    """Find the near-duplicates of a data set, and remember them in `folder`.

    `stored` has `images`, `names` and `digest`; `index` has the indices of "train", "val" and
    "test".
    """
    others = np.sort(np.concatenate([index["train"], index["val"]]))
    parts = [stored.digest, environment.code_of(__name__), others.tolist(), index["test"].tolist()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = folder / f"{key[:16]}.duplicates.json"
    if (content := checksums.read(path)) is None:
        pairs = [
            (stored.names[test], stored.names[other], alike)
            for test, other, alike in find(stored.images, index["test"], others)
        ]
        content = json.dumps(pairs).encode()
        with contextlib.suppress(UserError):  # a folder of images that others share is read-only
            checksums.write(path, content)
    return tuple(NearDuplicate(*pair) for pair in json.loads(content))


def summary(pairs: tuple[NearDuplicate, ...]) -> str:
    """One line on the near-duplicates of a data set that has some."""
    test, other, _ = pairs[0]
    noun = "test image is" if len(pairs) == 1 else "test images are"
    return (
        f"{len(pairs)} {noun} nearly equal to an image to learn from, first {test} to {other}; the "
        "split stays, and every record also has the accuracy without them"
    )
