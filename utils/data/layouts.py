"""Discovery of the labelled images of a two-class data set, without flags or a fixed layout.

A folder on the path of an image names its split (train, test_set, ...). The folder that holds the
image names its class. If it cannot, the file name does: cat.0.jpg is a cat if it lies in the root
or in the folder of a split, or if all images lie in one folder that is not named after a class.
Names are compared in composed Unicode, because macOS decomposes them.
"""

import functools
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils import studies
from utils.errors import UserError, printable

DEEPEST = 100  # nested folders
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif",
    ".heic", ".heif",
)  # fmt: skip
ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"})
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "validating", "dev"), "val"),
    **dict.fromkeys(("test", "tests", "testing", "tst"), "test"),
}
# Words next to one of these in the name of a folder, as in train_data, TestSet or "val images".
NEUTRAL = re.compile(
    r"(data|set|dataset|folder|dir|split|part|images?|imgs?|pics?|pictures?|photos?|samples?|files?"
    r"|jpe?gs?|pngs?|small|full|new|all|\d+)+"
)
# Words that may stand for a split, but do not say which.
VAGUE = {"eval", "evaluate", "evaluation", "holdout", "heldout", "unseen", "trainval", "testval"}
PARTS = ("train", "val", "test")
SINGULAR = {"cats": "cat", "dogs": "dog"}
CATS_AND_DOGS = ("cat", "dog")
KAGGLE = "Kaggle Cat and Dog"  # the dissertation's data set
LISTED = 5  # classes that an error names if there are too many
OFFERED = 20  # classes that an error names to choose from
EXPECTED = (
    "Expected two classes: folders like cats/ and dogs/, alone or inside train/ and test/, "
    "or files named like cat.0.jpg and dog.0.jpg."
)


@dataclass(frozen=True)
class Image:
    """One labelled image file.

    `path` is absolute. `name` is the path relative to the root of the data set, with forward
    slashes. `label` is 0 or 1. `split` is "train", "val" or "test"; it is None for every image of a
    data set without splits.
    """

    path: Path
    name: str
    label: int
    split: str | None


@dataclass(frozen=True)
class Folder:
    """A two-class data set on disk.

    `classes` are in label order (cat 0, dog 1), `images` are sorted by name. Each split that occurs
    has images of both classes. If there are splits, "train" is one of them. `layout` is a name for
    people, `study` a slug ([a-z0-9_]+) for the folder of results. `ignored` counts the files that
    are not images of the two classes, except hidden files.
    """

    root: Path
    layout: str
    study: str
    classes: tuple[str, str]
    images: tuple[Image, ...]
    ignored: int


class _Row(NamedTuple):
    """What the path of an image says about it."""

    name: str
    label: str  # its class
    split: str | None


def find(path: Path, classes: tuple[str, str] | None = None) -> Folder:
    """Return the data set below `path`, or its images of the two `classes`; open no image.

    Case and order of `classes` do not matter, and "cats" means "cat". Broken images are not
    filtered out.

    Raises UserError if the folder is missing or cannot be read, if it does not hold exactly two
    classes and `classes` does not choose two of them, if a split lacks one of the two, or if a
    folder looks like a split that is not known.
    """
    root = _root(Path(path))
    files = list(_files(root, "", frozenset({_identity(root)})))
    names = sorted(name for name, is_file in files if is_file and name.lower().endswith(SUFFIXES))
    chosen = classes and _chosen(classes)
    labels = _labels(root, names, chosen)
    rows, others = _rows(labels), set()
    if chosen:
        _check_chosen(root, classes, Counter(labels.values()))
        others = {row.label for row in rows} - set(chosen)
        rows = _rows({name: label for name, label in labels.items() if label in chosen})
    pair = _pair(root, rows)
    _check_names(root, pair)
    _check_unknown_splits(root, labels)
    _check_splits(root, rows, pair)
    layout = _layout(root, rows, pair, whole=not others)
    if layout == KAGGLE:
        study = studies.DISSERTATIONS
    else:
        study = studies.slug(root.name, *pair) if others else studies.slug(root.name)
    images = tuple(
        Image(root / row.name, _composed(row.name), pair.index(row.label), row.split)
        for row in rows
    )
    return Folder(root, layout, study, pair, images, len(files) - len(images))


def _root(path: Path) -> Path:
    path = path.expanduser()
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    if is_file and path.suffix.lower() in ARCHIVES:
        raise UserError(f"{path} is an archive: unpack it and give the folder that it unpacks to.")
    if is_file:
        raise UserError(f"{path} is a file: give the folder that holds the images.")
    if not is_folder:
        raise UserError(f"{path} does not exist: give the folder that holds the images.")
    # Links are not resolved: the study is named after the link that the user gave, not its target.
    return path.absolute() if ".." not in path.parts and path.name else path.resolve()


def _identity(folder: Path) -> tuple[int, int]:
    """Return the device and inode of `folder`, which are the same through any link."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _files(
    folder: Path, prefix: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, bool]]:
    """Yield the name of everything below `folder` except folders, and whether it is a file.

    `prefix` precedes each name. Links are followed, except back to a folder in `above`. Raises
    UserError for more than DEEPEST nested folders.
    """
    if len(above) > DEEPEST:
        where = printable(folder)[-100:]
        raise UserError(
            f"{where}: more than {DEEPEST} nested folders. Give the folder that holds the images."
        )
    try:
        with os.scandir(folder) as entries:
            for item in entries:
                # The Path of a dangling link is neither file nor folder; a DirEntry may raise.
                entry = Path(item.path) if item.is_symlink() else item
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if not entry.is_dir():
                    yield prefix + entry.name, entry.is_file()
                elif (identity := _identity(Path(entry))) not in above:
                    yield from _files(Path(entry), f"{prefix}{entry.name}/", above | {identity})
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(folder)}: {error.strerror}.") from error


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _class(word: str) -> str:
    word = _composed(word).lower()
    return SINGULAR.get(word, word)


def _folder_class(name: str) -> str | None:
    """Return the class that the image's folder names; None for the root or a split's folder."""
    *folders, _ = name.split("/")
    return _class(folders[-1]) if folders and split_of(folders[-1]) is None else None


def _file_class(name: str) -> str | None:
    """Return the class in the first letters of the file's name; None if there are no letters."""
    letters = re.match(r"[^\W\d_]+", _composed(name.rpartition("/")[2].rpartition(".")[0]))
    return letters and _class(letters.group())


def _chosen(classes: tuple[str, str]) -> tuple[str, str]:
    first, second = sorted(map(_class, classes))
    if first == second:
        raise UserError(f"--classes {shlex.join(classes)}: give two different classes.")
    return first, second


def _labels(root: Path, names: list[str], chosen: tuple[str, str] | None) -> dict[str, str]:
    """Return the class of each name that has one; raise UserError if none has.

    If one folder that is not named after a class holds all images, the file names count, provided
    that they name the `chosen` classes, by default cat and dog: img_1 and dsc_2 are not classes.
    """
    if not names:
        packed = [
            entry.name for entry in sorted(root.iterdir()) if entry.suffix.lower() in ARCHIVES
        ]
        hint = f"Unpack {printable(packed[0])} first." if packed else EXPECTED
        raise UserError(f"no images in {root}.\n{hint}")
    labels = _known({name: _folder_class(name) or _file_class(name) for name in names})
    if not labels:
        raise UserError(
            f"{root}: {len(names)} images, for example {printable(names[0])}, "
            f"but none carries a label.\n{EXPECTED}"
        )
    kinds, wanted = {row.label for row in _rows(labels)}, set(chosen or CATS_AND_DOGS)
    if len(kinds) == 1 and not kinds & wanted:
        by_file = _known({name: _file_class(name) for name in names})
        if {row.label for row in _rows(by_file)} >= wanted:
            return by_file
    return labels


def _known(labels: dict[str, str | None]) -> dict[str, str]:
    return {name: label for name, label in labels.items() if label is not None}


def _rows(labels: dict[str, str]) -> list[_Row]:
    """Return a row per image of the data set; either all rows have a split or none has."""
    rows = [_Row(name, label, _split(name)) for name, label in labels.items()]
    splits = {row.split for row in rows}
    if "train" in splits:  # other folders, like single_prediction, do not belong to the data set
        return [row for row in rows if row.split is not None]
    if None in splits and len(splits) > 1:  # class folders next to a test folder
        return [row._replace(split=row.split or "train") for row in rows]
    return rows


@functools.cache
def split_of(folder: str) -> str | None:
    """Return the split that a folder's name stands for: "train", "val", "test" or None.

    One word names the split; all others are `NEUTRAL`, and may be joined to it.
    """
    splits = {SPLITS.get(word) for word in _split_words(folder)}
    return splits.pop() if len(splits) == 1 else None


def _split_words(folder: str) -> list[str]:
    """Return the words of a folder's name that are not neutral; [] if all are.

    A split's word loses the neutral words that are joined to its end: testset is test.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", _composed(folder))
    words = re.findall(r"[^\W_]+", spaced.lower())
    kept = [word for word in words if not NEUTRAL.fullmatch(word)]
    return [_without_neutral_end(word) for word in kept]


def _without_neutral_end(word: str) -> str:
    for known in sorted(SPLITS, key=len, reverse=True):
        if word.startswith(known) and NEUTRAL.fullmatch(word[len(known) :]):
            return known
    return word


def _split_folder(name: str) -> str | None:
    """Return the innermost folder that names a split, or None."""
    return next((part for part in reversed(name.split("/")[:-1]) if split_of(part)), None)


def _split(name: str) -> str | None:
    folder = _split_folder(name)
    return None if folder is None else split_of(folder)


def _check_chosen(root: Path, classes: tuple[str, str], counts: Counter[str]) -> None:
    """Raise UserError if one of the `classes`, as the user gave them, has no image."""
    missing = " or ".join(name for name in classes if _class(name) not in counts)
    if missing:
        raise UserError(
            f"--classes {shlex.join(classes)}: {root} has no images of {missing}, "
            f"only of {_listed(counts, OFFERED)}."
        )


def _listed(counts: Counter[str], limit: int) -> str:
    """Return text on the `limit` largest classes and the number of the others."""
    listed = ", ".join(
        f"{printable(name)} ({count} image{'' if count == 1 else 's'})"
        for name, count in counts.most_common(limit)
    )
    return f"{listed} and {len(counts) - limit} more" if len(counts) > limit else listed


def _pair(root: Path, rows: list[_Row]) -> tuple[str, str]:
    """Return the two classes, sorted; raise UserError if there are more or fewer."""
    counts = Counter(row.label for row in rows)
    if len(counts) == 2:
        first, second = sorted(counts)
        return first, second
    listed = _listed(counts, LISTED)
    if len(counts) == 1:
        raise UserError(f"{root}: found 1 class: {listed}.\n{EXPECTED}")
    example = printable(shlex.join(sorted(name for name, _ in counts.most_common(2))))
    raise UserError(
        f"{root}: found {len(counts)} classes: {listed}.\n"
        f"Choose two with --classes A B, for example --classes {example}"
    )


def _check_names(root: Path, pair: tuple[str, str]) -> None:
    """Raise UserError if a class has a name that tables and figures cannot print."""
    for name in pair:
        if printable(name) != name:
            raise UserError(
                f"{root}: the class {printable(name)} has characters that cannot be printed. "
                "Rename its folder."
            )


def _check_unknown_splits(root: Path, labels: dict[str, str]) -> None:
    """Raise UserError if a folder above the classes looks like a split, but is not recognised."""
    for folder in sorted({folder for name in labels for folder in name.split("/")[:-2]}):
        if split_of(folder) is None and set(_split_words(folder)) & {*SPLITS, *VAGUE}:
            known = sorted({_split_folder(name) or "" for name in labels} - {""})
            rest = f"; recognised: {printable(', '.join(known))}" if known else ""
            raise UserError(
                f"{root}: the folder {printable(folder)} looks like a split, but its name does not "
                f"say which{rest}.\nCall such folders train, val or test, or move them elsewhere."
            )


def _check_splits(root: Path, rows: list[_Row], pair: tuple[str, str]) -> None:
    """Raise UserError if a split lacks a class, or if there are splits but none to train on."""
    present = {(row.split, row.label) for row in rows}
    splits = sorted({row.split for row in rows if row.split})
    for split in splits:
        for label in pair:
            if (split, label) not in present:
                raise UserError(f"{root}: no {label} images among those for {split}.\n{EXPECTED}")
    if splits and "train" not in splits:
        raise UserError(
            f"{root}: no images for train, only for {' and '.join(splits)}.\n"
            "Add a folder train/, or give the folder that holds the classes, which is then split."
        )


def _layout(root: Path, rows: list[_Row], pair: tuple[str, str], whole: bool) -> str:
    """Return the layout's name for people; `whole` means that there are no other classes."""
    folders = {_split_folder(row.name) for row in rows} - {None}
    if all(_folder_class(row.name) != row.label for row in rows):
        parts = f": {_described(folders)}" if folders else ""
        return (
            f"{'Kaggle Dogs vs. Cats' if pair == CATS_AND_DOGS else 'files named by class'}{parts}"
        )
    if (
        whole
        and pair == CATS_AND_DOGS
        and {folder.lower() for folder in folders} == {"training_set", "test_set"}
    ):
        return KAGGLE
    if folders:
        return f"split and class folders: {_described(folders)}"
    if pair == CATS_AND_DOGS and all(
        (root / row.name).parent.parent.name.lower() == "petimages" for row in rows
    ):
        return "Microsoft PetImages"
    return "class folders"


def _described(folders: set[str]) -> str:
    """Say which folders each split consists of, for example "train from Train, test from Test"."""
    parts = {split: sorted(name for name in folders if split_of(name) == split) for split in PARTS}
    return ", ".join(
        f"{split} from {printable(' and '.join(names))}" for split, names in parts.items() if names
    )
