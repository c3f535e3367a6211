"""From the command line to the images of a study, decoded and split.

Errors in the data are raised before torch is imported, which takes seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import paths, progress, results, studies
from utils.cli import Options
from utils.data import cache, duplicates, layouts, partition, synthetic
from utils.data.duplicates import NearDuplicate
from utils.errors import UserError, printable

if TYPE_CHECKING:
    from utils.data.dataset import Data

SYNTHETIC_SEED = 0
SYNTHETIC_COUNTS = {"train": 1700, "val": 300, "test": 1000}
SMOKE_COUNTS = {"train": 16, "val": 8, "test": 8}
KAGGLE_DATASET = "d4rklucif3r/cat-and-dogs"  # named in the dissertation


@dataclass(frozen=True)
class Source:
    """The images that the command line asks for, decoded and split, but not yet tensors."""

    study: str  # name of its folder in results, figures and checkpoints
    classes: tuple[str, str]  # label 0, label 1
    stored: cache.Cache
    # "train" | "val" | "test" -> int64 indices into `stored`, ascending
    index: dict[str, np.ndarray]
    layout: str | None  # how folders and names were understood; None for drawn images
    near_duplicates: tuple[NearDuplicate, ...]

    @property
    def digest(self) -> str:
        """64 hexadecimal digits that identify all images, names, labels and splits."""
        return self.stored.digest


def load_images(options: Options) -> "Data":
    """Return the images that `options` ask for, as tensors to train, validate and test on.

    Raises UserError as `open_source` does, and if torch cannot use the device.
    """
    if options.device != "cpu":
        find(options)  # reports a mistake in the data before torch is imported,
        check_device(options.device)  # and a missing GPU before minutes of decoding
    source = open_source(options)
    from utils.data.dataset import Data, Split  # imports torch

    stored = source.stored
    parts = {
        name: Split(stored.images, stored.labels, stored.names, rows)
        for name, rows in source.index.items()
    }
    return Data(
        study=source.study,
        classes=source.classes,
        digest=source.digest,
        train=parts["train"],
        validation=parts["val"],
        test=parts["test"],
        broken=len(stored.broken),
        layout=source.layout,
        near_duplicates=source.near_duplicates,
    )


def open_source(options: Options) -> Source:
    """Return the images that `options` ask for; decode or draw them unless a cache holds them.

    The first line that it prints names the study and its folder of results. Raises UserError if the
    images are missing, cannot be read, or leave a part without one of the classes.
    """
    directory, folder = options.checkpoints / "images", find(options)
    if folder is None:
        counts = SMOKE_COUNTS if options.smoke else SYNTHETIC_COUNTS
        pending = cache.identify_synthetic(SYNTHETIC_SEED, counts, directory)
        study, classes = _study(studies.DRAWN, pending.digest, options), synthetic.CLASSES
        stored = pending.open()
        summary = cache.synthetic_summary(counts)
    else:
        pending = cache.identify_folder(folder, directory)
        study, classes = _study(folder.study, pending.digest, options), folder.classes
        stored = pending.open()
        summary = cache.summary(folder, stored)
    progress.say(f"data: {summary}")
    index = _split(stored, options)
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in index.items())
    progress.say(f"data: {sizes} images, sha256 {stored.digest[:12]}")
    near = duplicates.of_source(stored, index, directory)
    if near:
        progress.say(f"data: {printable(duplicates.summary(near))}")
    return Source(study, classes, stored, index, folder and folder.layout, near)


def find(options: Options) -> layouts.Folder | None:
    """Return the data set that `--data` names, without opening an image; None for drawn images.

    Downloads "kaggle" first. Raises UserError if there are no images of two classes.
    """
    if options.data is None:
        return None
    folder = Path(download() if options.data == "kaggle" else options.data)
    return layouts.find(folder, options.classes)


def _study(name: str, digest: str, options: Options) -> str:
    """Return the name of the study and print it, with its folder.

    Raises UserError if its results or checkpoints could not be written.
    """
    if options.smoke:  # its results mean nothing, so one folder serves runs on any images
        study = name + studies.SMOKE_SUFFIX
    else:
        study = studies.study_name(name, digest, results.images_digest(options.results / name))
    text = f"data: study {study}, "
    if not options.smoke and study != name:
        text += f"because {options.results.name}/{name} holds runs of other images; "
    progress.say(f"{text}results in {options.results / study}")
    for folder in (options.results, options.checkpoints):
        paths.probe(folder / study)
    return study


def _split(stored: cache.Cache, options: Options) -> dict[str, np.ndarray]:
    """Return the indices of each part; raise UserError if a part lacks one of the classes."""
    index = partition.split(stored.names, stored.labels, stored.splits, stored.hashes)
    for name, rows in index.items():
        if len(np.unique(stored.labels[rows])) < 2:
            raise UserError(
                f"--data {options.data}: the {name} part has {len(rows)} usable images "
                "and not both classes. Give at least 3 different images of each class, "
                "and test images that differ from the training images."
            )
    if not options.smoke:
        return index
    return {
        name: partition.sample(stored, rows, SMOKE_COUNTS[name]) for name, rows in index.items()
    }


def check_device(device: str) -> None:
    """Raise UserError if torch cannot use `device`, "cpu" or "cuda"."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no usable GPU here; leave --device out to run on the CPU."
        )


def download() -> str:
    """Return the folder of the Kaggle data set, downloaded once by kagglehub.

    Raises UserError if kagglehub is missing or the download fails.
    """
    try:
        import kagglehub
    except ImportError:
        raise UserError(
            "--data kaggle needs the package kagglehub: pip install kagglehub"
        ) from None
    try:
        return kagglehub.dataset_download(KAGGLE_DATASET)
    except Exception as error:  # kagglehub passes on whatever its HTTP layer raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--data kaggle: the download failed ({reason[:120]}). "
            "Check the network and your Kaggle login, or download "
            f"https://www.kaggle.com/datasets/{KAGGLE_DATASET} by hand and give its folder."
        ) from None
