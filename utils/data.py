"""The images of a study as tensors: splits that are the same everywhere, batches, augmentation, calibration.

Every script sees the same test images in the same order. Decoding happens once, in `utils.cache`; here a batch is a slice of
a memory-mapped uint8 array, so memory stays bounded whatever the size of the data set, and no worker processes are needed.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from utils import cache, drawn, layouts, progress, results
from utils.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
SPLIT_SEED = 0  # never --seed: all seeds of a study must share their test images
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.15
DRAWN_SEED = 0
DRAWN_COUNTS = {"train": 1700, "val": 300, "test": 1000}
SMOKE_COUNTS = {"train": 32, "val": 16, "test": 16}
KAGGLE_DATASET = "tongpython/cat-and-dog"


@dataclass(frozen=True)
class Split:
    """Some of the cached images, in a fixed order."""

    images: np.ndarray  # uint8 (all, 224, 224, 3), memory-mapped
    labels: np.ndarray  # int64 (all,)
    names: tuple[str, ...]  # of all images
    index: np.ndarray = field(repr=False)  # int64 (len(self),): which of them belong here

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self):
        """Another process gets the file's name, not its bytes."""
        return _reopen, (self.images.filename, self.labels, self.names, self.index)

    @property
    def y(self) -> np.ndarray:
        """Labels, int64 (len(self),)."""
        return self.labels[self.index]

    def batch(self, positions: np.ndarray, device: str = "cpu") -> torch.Tensor:
        """Images at `positions` of this split: float32 (n, 3, 224, 224) in [0, 1], channels last, not normalised."""
        pixels = torch.from_numpy(self.images[self.index[positions]])
        return pixels.to(device).permute(0, 3, 1, 2).float().div_(255)

    def batches(self, batch_size: int, device: str = "cpu") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All images in order, normalised, with their labels."""
        for start in range(0, len(self), batch_size):
            positions = np.arange(start, min(start + batch_size, len(self)))
            yield normalize_(self.batch(positions, device)), torch.from_numpy(self.y[positions]).to(device)

    def shuffled(
        self, batch_size: int, seed: int, device: str = "cpu", augmentation: dict | None = None, part: tuple[int, int] = (0, 1)
    ):
        """One epoch of full batches in an order drawn from `seed`, augmented, normalised, with their labels.

        With `part` (rank, size), only every size-th image of each batch: all ranks together see what one process would. The
        rest that does not fill a batch is left out (another one each epoch): BatchNorm cannot learn from one image.
        """
        own = slice(part[0], None, part[1])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).numpy()
        batch_size = min(batch_size, len(self))
        for start in range(0, len(self) - batch_size + 1, batch_size):
            positions = order[start : start + batch_size][own]
            images = self.batch(positions, device)
            if augmentation:
                images = augment(images, torch.rand(batch_size, 5, generator=generator)[own], **augmentation)
            yield normalize_(images), torch.from_numpy(self.y[positions]).to(device)

    def part(self, rank: int, size: int) -> "Split":
        """Every size-th image from `rank` on."""
        return Split(self.images, self.labels, self.names, self.index[rank::size])

    def sample(self, count: int, seed: int = SPLIT_SEED) -> "Split":
        """At most `count` images, classes in equal parts where there are enough, chosen by name: the same everywhere."""
        per_class = [_ranked(self.index[self.y == label], self.names, seed) for label in np.unique(self.y)]
        turns = [rows[rank] for rank in range(max(map(len, per_class))) for rows in per_class if rank < len(rows)]
        return Split(self.images, self.labels, self.names, np.sort(np.array(turns[:count], dtype=np.int64)))

    def calibration(self, count: int) -> torch.Tensor:
        """`count` images as PTQ calibrates on them: float32 (count, 3, 224, 224), normalised, not augmented."""
        chosen = self.sample(count)
        return normalize_(chosen.batch(np.arange(len(chosen))))


def _reopen(filename: str, *rest) -> Split:
    return Split(np.load(filename, mmap_mode="r"), *rest)


@dataclass(frozen=True)
class Data:
    """One study's images."""

    study: str  # drawn | cats_and_dogs | ...; ends in _smoke for smoke runs
    classes: tuple[str, str]
    digest: str  # sha256 of the content
    train: Split
    validation: Split
    test: Split
    broken: int  # files that could not be decoded

    def describe(self) -> dict:
        """What a result says about its data."""
        counts = {name: len(getattr(self, name)) for name in ("train", "validation", "test")}
        return {
            "study": self.study,
            "classes": list(self.classes),
            "sha256": self.digest,
            "broken": self.broken,
            **counts,
        }


def normalize(images: torch.Tensor) -> torch.Tensor:
    """ImageNet normalisation of float images (n, 3, h, w) in [0, 1]."""
    return normalize_(images.clone())


def normalize_(images: torch.Tensor) -> torch.Tensor:
    """The same in place: a batch just made is in no other's hands, and another 19 MB would cost as much as the arithmetic."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    if not images.is_contiguous(memory_format=torch.channels_last):
        return images.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))
    # Channels last, torch would loop over three numbers at a time; over whole rows of the image it takes a tenth of that.
    width = images.shape[3]
    images.permute(0, 2, 3, 1).flatten(2).sub_(mean.repeat(width)).div_(std.repeat(width))
    return images


def augment(images: torch.Tensor, uniform: torch.Tensor, crop: float, degrees: float) -> torch.Tensor:
    """Random crops, flips and rotations of a batch (n, 3, h, w), as one affine resampling: pixels are interpolated once.

    A crop shows between `crop` and all of the image's side, placed anywhere inside; a rotation is uniform in +-`degrees`;
    half of the images are mirrored. `uniform`, (n, 5) in [0, 1), is all the chance there is. What falls outside the image is
    filled by reflection.
    """
    side = crop + (1 - crop) * uniform[:, 0]
    angle = math.radians(degrees) * (2 * uniform[:, 1] - 1)
    mirror = torch.where(uniform[:, 2] < 0.5, -1.0, 1.0)
    shift = (2 * uniform[:, 3:] - 1) * (1 - side)[:, None]
    cos, sin = side * angle.cos(), side * angle.sin()
    # Where each pixel of the result lies in the image, whose side goes from -1 to 1. `F.affine_grid` computes the same by a
    # matrix product for every pixel, which would take as long as the resampling itself.
    height, width = images.shape[2:]
    across, down = (((2 * torch.arange(n) + 1) / n - 1).to(images.device) for n in (width, height))
    grid = torch.empty(len(images), height, width, 2, device=images.device)
    for axis, (by_x, by_y) in enumerate([(cos * mirror, -sin), (sin * mirror, cos)]):
        by_x, by_y, offset = (own.to(images.device)[:, None] for own in (by_x, by_y, shift[:, axis]))
        torch.add((by_x * across)[:, None], (by_y * down + offset)[..., None], out=grid[..., axis])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def load(args) -> Data:
    """The images that `--data` names (the drawn ones without it), split; raises `UserError` where there are none."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no usable GPU here; leave --device out to run on the CPU.")
    directory = args.checkpoints / "images"
    if args.data is None:
        counts = SMOKE_COUNTS if args.smoke else DRAWN_COUNTS
        stored = cache.open_drawn(DRAWN_SEED, counts, directory, drawn.draw, drawn.VERSION)
        study, classes = "drawn", drawn.CLASSES
    else:
        folder = layouts.find(download() if args.data == "kaggle" else args.data)
        stored = cache.open_folder(folder, directory)
        study, classes = folder.study, folder.classes
    index = split(stored.names, stored.labels, stored.splits, stored.hashes)
    parts = {name: Split(stored.images, stored.labels, stored.names, rows) for name, rows in index.items()}
    if args.smoke:
        parts = {name: part.sample(SMOKE_COUNTS[name]) for name, part in parts.items()}
        study += "_smoke"
    for name, part in parts.items():
        if len(np.unique(part.y)) < 2:
            raise UserError(f"--data {args.data}: the {name} part has {len(part)} usable images and not both classes.")
    if not args.smoke:  # whose results mean nothing anyway
        results.check(study, stored.digest, args)
    sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    progress.say(f"data: study {study}, {sizes} images, sha256 {stored.digest[:12]}")
    return Data(study, classes, stored.digest, parts["train"], parts["val"], parts["test"], len(stored.broken))


def split(names, labels, splits, hashes) -> dict[str, np.ndarray]:
    """Which images train, validate and test, as {"train" | "val" | "test": sorted int64 indices}.

    The data set's own folders decide first. Without a test folder, a stratified `TEST_SHARE` of the images tests; without a
    validation folder, a stratified `VALIDATION_SHARE` of the training images validates. Both are chosen by hashed file name,
    so they do not depend on the machine, the order of files or a random generator. A training image whose bytes also lie
    in the test part is left out: it would be known by heart.
    """
    labels = np.asarray(labels)
    rows = {name: np.array([i for i, own in enumerate(splits) if own == name], np.int64) for name in ("train", "val", "test")}
    rest = np.array([i for i, own in enumerate(splits) if own is None], np.int64)
    rows["train"] = np.sort(np.concatenate([rows["train"], rest]))
    if len(rows["test"]) == 0:
        rows["train"], rows["test"] = _cut(rows["train"], labels, names, TEST_SHARE)
    seen = {hashes[i] for i in rows["test"]}
    for name in ("train", "val"):
        kept = np.array([i for i in rows[name] if hashes[i] not in seen], np.int64)
        if leaked := len(rows[name]) - len(kept):
            progress.say(f"data: {leaked} {name} images are copies of test images and are left out")
        rows[name] = kept
    if len(rows["val"]) == 0:
        rows["train"], rows["val"] = _cut(rows["train"], labels, names, VALIDATION_SHARE)
    return rows


def _cut(index: np.ndarray, labels: np.ndarray, names, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split `index` into the rest and a stratified `share`, at least one image of each class in the share."""
    taken = []
    for label in np.unique(labels[index]):
        rows = _ranked(index[labels[index] == label], names, SPLIT_SEED)
        taken.extend(rows[: max(1, round(share * len(rows)))])
    taken = np.sort(np.array(taken, np.int64))
    return np.setdiff1d(index, taken), taken


def _ranked(index: np.ndarray, names, seed: int) -> list[int]:
    """`index` in the order of the hashes of seed and file name (the folders above may be named in many ways)."""
    return sorted(index, key=lambda i: hashlib.sha256(f"{seed}:{names[i].rsplit('/')[-1]}".encode()).digest())


def download() -> str:
    """Folder of the Kaggle "Cat and Dog" data set, downloaded once by kagglehub; raises `UserError` when it cannot be had."""
    try:
        import kagglehub
    except ImportError:
        raise UserError("--data kaggle needs the package kagglehub: pip install kagglehub") from None
    try:
        return kagglehub.dataset_download(KAGGLE_DATASET)
    except Exception as error:  # it raises whatever its HTTP layer does; all of it means the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--data kaggle: the download failed ({reason[:120]}). Check the network and your Kaggle login, or download "
            f"https://www.kaggle.com/datasets/{KAGGLE_DATASET} by hand and give its folder."
        ) from None
