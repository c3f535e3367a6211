"""Find the labelled images of a two-class data set, however people have it on disk: no flags, no fixed layout.

One rule covers them all. The split is named by a folder on the way to the image (train, test_set, ...), the class by
the folder that holds the image, or by the first letters of the file name where that folder is a split or the root.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"})
SPLITS = {
    **dict.fromkeys(("train", "training", "training_set"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validation_set", "dev"), "val"),
    **dict.fromkeys(("test", "test_set", "testing", "test1"), "test"),
}
SINGULAR = {"cats": "cat", "dogs": "dog"}
CATS_AND_DOGS = ("cat", "dog")
EXPECTED = (
    "Expected two classes: folders such as cats/ and dogs/, on their own or inside train/ and test/, "
    "or files named like cat.0.jpg and dog.0.jpg."
)


@dataclass(frozen=True)
class Image:
    """One labelled image file.

    `path` is absolute, `name` is the same relative to the data set's root with forward slashes, `label` is 0 or 1, and
    `split` is "train", "val" or "test", or None in every image of a data set that comes without splits.
    """

    path: Path
    name: str
    label: int
    split: str | None


@dataclass(frozen=True)
class Folder:
    """A data set on disk: two `classes` in label order (cat 0, dog 1) and its `images`, sorted by name.

    Each split that occurs has both classes, and where splits occur "train" is one of them. `layout` is a name for
    people, `study` a slug ([a-z0-9_]+) for the folder of results, `ignored` the number of files that are no labelled
    image (hidden files not counted).
    """

    root: Path
    layout: str
    study: str
    classes: tuple[str, str]
    images: tuple[Image, ...]
    ignored: int


def find(path: Path) -> Folder:
    """Return the data set below `path`; nothing is opened, so broken images are still among its images.

    Raises UserError, saying what was found and what was expected, if there is no such folder, if it cannot be read, or
    if it does not hold images of exactly two classes in every split that it has.
    """
    root = _root(Path(path))
    files = list(_files(root, "", frozenset({_identity(root)})))
    names = sorted(name for name, is_file in files if is_file and name.lower().endswith(SUFFIXES))
    rows, by_file = _rows(names), False
    if len({label for _, label, _ in rows}) != 2:
        # File names overrule folder names only if they say "cat" and "dog": img_1 and dsc_2 are no classes.
        by_name = _rows(names, by_file=True)
        if {label for _, label, _ in by_name} == set(CATS_AND_DOGS):
            rows, by_file = by_name, True
    classes = _classes(root, names, rows)
    layout = _layout(root, rows, classes, by_file)
    images = tuple(Image(root / name, name, classes.index(label), split) for name, label, split in rows)
    study = "cats_and_dogs" if layout == "Kaggle Cat and Dog" else _slug(root.name)
    return Folder(root, layout, study, classes, images, len(files) - len(images))


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
        raise UserError(f"no such folder: {path}")
    # Not resolved in full: the name that the user gave, not that of a link's target, becomes the study's name.
    return path.absolute() if ".." not in path.parts and path.name else path.resolve()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _files(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """Yield the name (`prefix` and all) of everything below `folder` but folders, and whether it is a regular file.

    Links are followed, but not one that leads back to a folder `above`.
    """
    try:
        with os.scandir(folder) as entries:
            for found in entries:
                # Of a link that leads nowhere a Path says that it is neither file nor folder; a DirEntry may raise.
                entry = Path(found.path) if found.is_symlink() else found
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if not entry.is_dir():
                    yield prefix + entry.name, entry.is_file()
                elif (identity := _identity(Path(entry))) not in above:
                    yield from _files(Path(entry), f"{prefix}{entry.name}/", above | {identity})
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}.") from error


def _rows(names: list[str], by_file: bool = False) -> list[tuple[str, str, str | None]]:
    """Return (name, class, split) of the names that carry a label, with splits in either all of them or none."""
    rows = [(name, label, _split(name)) for name in names if (label := _class(name, by_file)) is not None]
    splits = {split for *_, split in rows}
    if "train" in splits:  # the rest is no part of the data set, such as a folder single_prediction
        return [row for row in rows if row[2] is not None]
    if None in splits:  # class folders with a test folder beside them
        return [(name, label, split or ("train" if len(splits) > 1 else None)) for name, label, split in rows]
    return rows


def _class(name: str, by_file: bool) -> str | None:
    *folders, file = name.split("/")
    if by_file or not folders or folders[-1].lower() in SPLITS:
        letters = re.match(r"[^\W\d_]+", file.rpartition(".")[0])
        if letters is None:
            return None
        word = letters.group().lower()
    else:
        word = folders[-1].lower()
    return SINGULAR.get(word, word)


def _split_folder(name: str) -> str | None:
    """Return the innermost folder that names a split, in lower case, or None."""
    return next((part.lower() for part in reversed(name.split("/")[:-1]) if part.lower() in SPLITS), None)


def _split(name: str) -> str | None:
    folder = _split_folder(name)
    return None if folder is None else SPLITS[folder]


def _classes(root: Path, names: list[str], rows: list[tuple[str, str, str | None]]) -> tuple[str, str]:
    """Return the two classes, sorted; raise UserError if there are more or fewer, or if a split lacks one."""
    if not names:
        packed = [entry.name for entry in sorted(root.iterdir()) if entry.suffix.lower() in ARCHIVES]
        hint = f"Unpack {packed[0]} first." if packed else EXPECTED
        raise UserError(f"no images in {root}.\n{hint}")
    if not rows:
        raise UserError(f"{root}: {len(names)} images, such as {names[0]}, but none carries a label.\n{EXPECTED}")
    counts = Counter(label for _, label, _ in rows)
    if len(counts) != 2:
        found = ", ".join(f"{label} ({count} images)" for label, count in counts.most_common(5))
        more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        plural = "1 class" if len(counts) == 1 else f"{len(counts)} classes"
        raise UserError(f"{root}: found {plural}: {found}{more}.\n{EXPECTED}")
    first, second = sorted(counts)
    pairs = {(split, label) for _, label, split in rows}
    for split in sorted({split for split, _ in pairs if split}):
        for label in (first, second):
            if (split, label) not in pairs:
                raise UserError(f"{root}: no {label} images among those for {split}.\n{EXPECTED}")
    if not {split for split, _ in pairs} & {"train", None}:
        raise UserError(
            f"{root}: no images for train, only for {' and '.join(sorted({split for split, _ in pairs}))}.\n"
            "Add a folder train/, or give the folder that holds the classes: it is then split anew."
        )
    return first, second


def _layout(root: Path, rows: list[tuple[str, str, str | None]], classes: tuple[str, str], by_file: bool) -> str:
    folders = {_split_folder(name) for name, *_ in rows} - {None}
    # Labels come from file names where the holding folder is the root or names a split.
    by_file = by_file or all("/" not in name or name.split("/")[-2].lower() in SPLITS for name, *_ in rows)
    if by_file:
        return "Kaggle Dogs vs. Cats" if classes == CATS_AND_DOGS else "files named by class"
    if classes == CATS_AND_DOGS and folders == {"training_set", "test_set"}:
        return "Kaggle Cat and Dog"
    if folders:
        return "split and class folders"
    if classes == CATS_AND_DOGS and all((root / name).parent.parent.name.lower() == "petimages" for name, *_ in rows):
        return "Microsoft PetImages"
    return "class folders"


def _slug(name: str) -> str:
    """Return `name` as [a-z0-9_]+, clear of the names that the project keeps for its own results."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "data"
    if slug in {"drawn", "cats_and_dogs"} or slug.endswith("_smoke"):
        return "data_" + slug.replace("_smoke", "smoke")
    return slug
