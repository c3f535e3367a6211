"""Random folders: each is a study of two classes, or one line says why not."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from utils.data import cache, layouts
from utils.errors import UserError

ODD = [
    "\x1b[31m",
    "a\nb",
    "\u202e",
    "caf\udce9",
    "NA",
    " ",
    "-rf",
    "'",
    "$(x)",
    "%s",
    "a" * 200,
    "nul",
    "...",
    "ünï",
    "1",
]
SPLITS = ["train", "training_set", "TEST", "test1", "val", "dev"]
CLASSES = ["cat", "cats", "Dogs", "dog", "fox"]
FOLDERS = st.sampled_from([*SPLITS, *CLASSES, *CLASSES, *ODD])
STEMS = st.sampled_from(["1", "2", "cat.0", "dog.1", "Cat_7", "dog (3)", ".hidden", "Thumbs", *ODD])
SUFFIXES = st.sampled_from([".jpg", ".jpg", ".PNG", ".gif", ".txt", ".zip", ""])


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, kind)
    return file.getvalue()


CONTENTS = {
    "image": _picture("JPEG"),
    "png": _picture("PNG"),
    "empty": b"",
    "text": b"no image",
    "torn": _picture("PNG")[:-20],
}
KINDS = st.sampled_from([*CONTENTS, "image", "image", "folder", "link", "broken link"])
ENTRIES = st.tuples(st.lists(FOLDERS, max_size=4), STEMS, SUFFIXES, KINDS)
# Few random trees hold two classes, so half of the examples start from a tree that does.
PAIRS = [
    ([split, name], str(i), ".jpg", "image")
    for split in ("train", "test")
    for name in ("cats", "dogs")
    for i in range(4)
]


def plant(root: Path, entries) -> None:
    """Make the entries below `root`, except those that collide or that the disk refuses."""
    for folders, stem, suffix, kind in entries:
        path = root.joinpath(*folders, stem + suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind in CONTENTS:
                path.write_bytes(CONTENTS[kind])
            elif kind == "folder":
                path.mkdir()
            else:
                path.symlink_to(root if kind == "link" else root / "nowhere")
        except (OSError, UnicodeEncodeError):
            continue


def check(folder: layouts.Folder) -> None:
    """Check the guarantees of `layouts.find`."""
    assert len(set(folder.classes)) == 2 and all(name.isprintable() for name in folder.classes)
    names = [image.name for image in folder.images]
    assert names == sorted(set(names)) and folder.ignored >= 0
    assert folder.study and all(
        character.islower() or character.isdecimal() or character == "_"
        for character in folder.study
    )
    splits = {image.split for image in folder.images}
    assert splits == {None} or ("train" in splits and None not in splits)
    for split in splits:
        assert {image.label for image in folder.images if image.split == split} == {0, 1}


@given(
    st.lists(ENTRIES, max_size=12),
    st.booleans(),
    st.sampled_from([None, ("cat", "dog"), ("fox", "dog")]),
)
def test_any_folder_is_two_classes_or_a_line(entries, with_pairs, classes):
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        root.mkdir()
        plant(root, [*PAIRS, *entries] if with_pairs else entries)
        try:
            folder = layouts.find(root, classes)
            check(folder)
            opened = cache.identify_folder(folder, Path(place) / "cache").open()
        except UserError as error:
            assert 0 < len(str(error).split("\n")) <= 2
            return
        stored = opened.labels
        assert set(np.unique(stored)) == {0, 1} and len(stored) <= len(folder.images)


def test_the_entries_are_of_the_stated_kinds(tmp_path):
    """The trees above do contain links, folders and names that are not UTF-8."""
    plant(
        tmp_path,
        [([], "a", ".jpg", kind) for kind in ("link",)] + [(["cat"], "caf\udce9", ".jpg", "image")],
    )
    assert (tmp_path / "a.jpg").is_symlink()
    assert [os.fsencode(path.name) for path in (tmp_path / "cat").iterdir()] == [b"caf\xe9.jpg"]
    plant(tmp_path, PAIRS)
    with pytest.raises(UserError):
        layouts.find(tmp_path / "train" / "cats")
