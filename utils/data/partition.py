"""Partition into training, validation and test images, the same on every machine. No torch."""

import hashlib

import numpy as np

from utils import progress

SPLIT_SEED = 0  # not --seed: all seeds of a study must share their test images
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.15


def split(names, labels, splits, hashes) -> dict[str, np.ndarray]:
    """Return the images of each part as {"train" | "val" | "test": ascending int64 indices}.

    Each argument has one entry per image: `labels` 0 or 1, `names` with forward slashes, `splits`
    "train", "val", "test" or None, `hashes` of the content.

    Existing splits are kept. Without test images, a stratified `TEST_SHARE` of the images becomes
    the test part. Without validation images, a stratified `VALIDATION_SHARE` of the training images
    becomes the validation part. Hashes of the file names choose both, so the machine, the order of
    files and random generators do not matter. Copies of test images are removed from the other
    parts, because the network would have seen them in training; a line says how many.
    """
    labels = np.asarray(labels)
    rows = {part: _where(splits, part) for part in ("train", "val", "test")}
    rows["train"] = np.sort(np.concatenate([rows["train"], _where(splits, None)]))
    if len(rows["test"]) == 0:
        rows["train"], rows["test"] = _cut(rows["train"], labels, names, TEST_SHARE)
    tested = {hashes[image] for image in rows["test"]}
    for part in ("train", "val"):
        kept = [image for image in rows[part] if hashes[image] not in tested]
        if leaked := len(rows[part]) - len(kept):
            copies = "1 image is a copy" if leaked == 1 else f"{leaked} images are copies"
            progress.say(f"data: {copies} of test images and left out of {part}")
        rows[part] = np.array(kept, np.int64)
    if len(rows["val"]) == 0:
        rows["train"], rows["val"] = _cut(rows["train"], labels, names, VALIDATION_SHARE)
    return rows


def _where(splits, part: str | None) -> np.ndarray:
    """Return the indices of the images whose split is `part`."""
    return np.array([image for image, split in enumerate(splits) if split == part], np.int64)


def _cut(
    index: np.ndarray, labels: np.ndarray, names, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Split `index` into the rest and a stratified `share`, at least one image of each class."""
    taken = []
    for label in np.unique(labels[index]):
        rows = _ranked(index[labels[index] == label], names, SPLIT_SEED)
        taken.extend(rows[: max(1, round(share * len(rows)))])
    taken = np.sort(np.array(taken, np.int64))
    return np.setdiff1d(index, taken), taken


def sample(images, index: np.ndarray, count: int, seed: int = SPLIT_SEED) -> np.ndarray:
    """Return at most `count` of the indices `index` (n,) into `images`, ascending int64.

    `images` has `labels`, int64, and `names`. The classes get equal parts if each has enough
    images. Hashes of `seed` and file name choose the images, the same ones on every machine.
    """
    labels = images.labels[index]
    per_class = [_ranked(index[labels == label], images.names, seed) for label in np.unique(labels)]
    turns = []  # the best-ranked image of each class, then the second-ranked of each, and so on
    for rank in range(max(map(len, per_class))):
        turns += [rows[rank] for rows in per_class if rank < len(rows)]
    return np.sort(np.array(turns[:count], dtype=np.int64))


def _ranked(index: np.ndarray, names, seed: int) -> list[int]:
    """Return `index` in the order of the hashes of seed and file name.

    Folders do not count, because copies of a data set name them differently.
    """

    def rank(image: int) -> bytes:
        name = names[image].rsplit("/")[-1]
        # A name whose bytes are not UTF-8 holds them as lone surrogates.
        return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest()

    return sorted(index, key=rank)
