"""The images of a study as tensors: splits, batches, calibration images.

Every script sees the same test images in the same order. `utils.data.cache` decodes each image
once. Here a batch is read from a memory-mapped uint8 array, so memory stays bounded for data sets
of any size, and no worker processes are needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from utils.data import partition
from utils.data.augmentation import augment, normalize_
from utils.data.duplicates import NearDuplicate


@dataclass(frozen=True)
class Split:
    """Some of the cached images in a fixed order."""

    images: np.ndarray  # uint8 (all, 224, 224, 3), memory-mapped
    labels: np.ndarray  # int64 (all,)
    names: tuple[str, ...]  # of all images
    index: np.ndarray = field(repr=False)  # int64 (len(self),): the images of this split

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self):
        """Pickle the name of the file instead of its bytes, for other processes."""
        return _reopen, (self.images.filename, self.labels, self.names, self.index)

    @property
    def y(self) -> np.ndarray:
        """Labels, int64 (len(self),)."""
        return self.labels[self.index]

    def batch(self, positions: np.ndarray, device: str = "cpu") -> torch.Tensor:
        """Return the images at `positions` (n,), float32 (n, 3, 224, 224) in [0, 1], on `device`.

        Their memory format is channels last. They are not normalised.
        """
        pixels = torch.from_numpy(self.images[self.index[positions]])
        return pixels.to(device).permute(0, 3, 1, 2).float().div_(255)

    def batches(
        self, batch_size: int, device: str = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield all images in order, float32 (n, 3, 224, 224) normalised, and labels, int64 (n,).

        n is `batch_size`, except in the last batch, which may be smaller.
        """
        for start in range(0, len(self), batch_size):
            positions = np.arange(start, min(start + batch_size, len(self)))
            yield (
                normalize_(self.batch(positions, device)),
                torch.from_numpy(self.y[positions]).to(device),
            )

    def shuffled(
        self,
        batch_size: int,
        seed: int,
        device: str = "cpu",
        augmentation: dict | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield one epoch of full batches in an order drawn from `seed`, as `batches` does.

        `augmentation` holds the keyword arguments of `augment`; None leaves the images unchanged.
        With `part` (rank, size), a batch holds only every size-th image: all ranks together see the
        batches of a single process. The images of the last, incomplete batch are left out, because
        BatchNorm cannot learn from a single image; they differ between seeds.
        """
        shard = slice(part[0], None, part[1])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).numpy()
        batch_size = min(batch_size, len(self))
        for start in range(0, len(self) - batch_size + 1, batch_size):
            positions = order[start : start + batch_size][shard]
            images = self.batch(positions, device)
            if augmentation:
                images = augment(
                    images, torch.rand(batch_size, 5, generator=generator)[shard], **augmentation
                )
            yield normalize_(images), torch.from_numpy(self.y[positions]).to(device)

    def part(self, rank: int, size: int) -> "Split":
        """Return every `size`-th image, starting with image `rank`."""
        return Split(self.images, self.labels, self.names, self.index[rank::size])

    def sample(self, count: int, seed: int = partition.SPLIT_SEED) -> "Split":
        """Return at most `count` images, the same number of each class; see `partition.sample`."""
        return Split(
            self.images, self.labels, self.names, partition.sample(self, self.index, count, seed)
        )

    def calibration(self, count: int) -> torch.Tensor:
        """Return the images for the calibration of PTQ: float32 (n, 3, 224, 224), normalised.

        n is `count`, or the size of the split if it is smaller. The images are not augmented.
        """
        chosen = self.sample(count)
        return normalize_(chosen.batch(np.arange(len(chosen))))


def _reopen(filename: str, *rest) -> Split:
    return Split(np.load(filename, mmap_mode="r"), *rest)


@dataclass(frozen=True)
class Data:
    """The images of one study."""

    study: str  # drawn | cats_and_dogs | ...; ends in _smoke for smoke runs
    classes: tuple[str, str]  # label 0, label 1
    digest: str  # sha256 of the content
    train: Split
    validation: Split
    test: Split
    broken: int  # files that could not be decoded
    layout: str | None = None  # how folders and names were understood; None for drawn images
    near_duplicates: tuple[NearDuplicate, ...] = ()  # test images among the images to learn from

    @property
    def without_duplicates(self) -> np.ndarray:
        """Which test images have no near-duplicate among the images to learn from, bool (n,)."""
        repeated = {pair.test for pair in self.near_duplicates}
        return np.array([self.test.names[image] not in repeated for image in self.test.index])

    def describe(self) -> dict:
        """Return the data section of a record: study, classes, hash, numbers of images."""
        negative, positive = self.classes
        return {
            "study": self.study,
            "negative_class": negative,
            "positive_class": positive,
            "sha256": self.digest,
            "broken": self.broken,
            "layout": self.layout,
            "near_duplicates": len(self.near_duplicates),
            "near_duplicate_pairs": [list(pair) for pair in self.near_duplicates],
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
        }
