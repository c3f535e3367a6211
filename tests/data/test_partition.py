"""Which images train, validate and test."""

import hashlib

import numpy as np
import pytest

from utils.data import partition

CATS, DOGS = 40, 60
NAMES = [f"cat/cat.{n}.jpg" for n in range(CATS)] + [f"dog/dog.{n}.jpg" for n in range(DOGS)]
LABELS = [0] * CATS + [1] * DOGS


def split(names=NAMES, labels=LABELS, splits=None, hashes=None):
    """Return the parts as sets of file names without their folders."""
    splits, hashes = splits or [None] * len(names), hashes or [f"hash of {name}" for name in names]
    parts = partition.split(names, labels, splits, hashes)
    assert all(
        rows.dtype == np.int64 and np.array_equal(rows, np.unique(rows)) for rows in parts.values()
    )
    return {part: {names[i].rsplit("/")[-1] for i in rows} for part, rows in parts.items()}


def count(names):
    """Return the numbers of cats and dogs."""
    cats = sum(name.startswith("cat") for name in names)
    return cats, sum(name.startswith("dog") for name in names)


def test_without_folders_a_share_of_each_class_tests_and_validates():
    parts = split()
    assert {name: count(names) for name, names in parts.items()} == {
        "train": (27, 41),
        "val": (5, 7),
        "test": (8, 12),
    }
    assert sorted(name for names in parts.values() for name in names) == sorted(
        name.rsplit("/")[-1] for name in NAMES
    )


def test_test_images_have_the_lowest_hashes_of_names():
    cats = sorted(
        (f"cat.{n}.jpg" for n in range(CATS)),
        key=lambda name: hashlib.sha256(f"0:{name}".encode()).hexdigest(),
    )
    assert {name for name in split()["test"] if name.startswith("cat")} == set(cats[:8])


def test_order_of_files_does_not_matter():
    order = np.random.default_rng(0).permutation(len(NAMES))
    assert split([NAMES[i] for i in order], [LABELS[i] for i in order]) == split()


@pytest.mark.parametrize("folder", ["PetImages/{}", "{}s", "a/b/{}", "data set/{}"])
def test_names_of_folders_do_not_matter(folder):
    renamed = [f"{folder.format(name.split('/')[0])}/{name.split('/')[1]}" for name in NAMES]
    assert split(renamed) == split()


def test_classes_with_the_same_file_names_are_split_the_same_way():
    names = [f"{kind}/{n}.jpg" for kind in ("Cat", "Dog") for n in range(20)]
    labels = [0] * 20 + [1] * 20
    test = partition.split(names, labels, [None] * 40, names)["test"]
    assert np.array_equal(test[:4] + 20, test[4:])
    assert len(test) == 8


def test_class_of_three_images_is_in_every_part():
    parts = split([*NAMES[:3], *NAMES[CATS:]], [0] * 3 + LABELS[CATS:])
    assert {name: count(names)[0] for name, names in parts.items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }


TENTH_TESTS = ["test" if n % 10 == 0 else "train" for n in range(100)]


def test_test_folder_is_respected():
    parts = split(splits=TENTH_TESTS)
    assert parts["test"] == {NAMES[i].rsplit("/")[-1] for i in range(0, 100, 10)}
    assert count(parts["val"]) == (round(0.15 * 36), round(0.15 * 54))
    assert not parts["val"] & parts["test"] and len(parts["train"]) == 90 - len(parts["val"])


def test_validation_folder_is_respected():
    splits = ["val" if n % 10 == 0 else "train" for n in range(100)]
    parts = split(splits=splits)
    assert parts["val"] == {NAMES[i].rsplit("/")[-1] for i in range(0, 100, 10)}
    assert count(parts["test"]) == (round(0.2 * 36), round(0.2 * 54))
    assert not parts["val"] & parts["test"]


def test_three_folders_stay_as_they_are():
    splits = [("train", "train", "val", "test")[n % 4] for n in range(100)]
    parts = split(splits=splits)
    for part in ("train", "val", "test"):
        assert parts[part] == {NAMES[i].rsplit("/")[-1] for i in range(100) if splits[i] == part}


def test_copies_of_test_images_are_left_out_of_training_and_validation(capsys):
    splits = [("train", "train", "val", "test")[n % 4] for n in range(100)]
    hashes = [str(n) for n in range(100)]
    hashes[0] = hashes[4] = hashes[3]  # two training images with the bytes of a test image
    hashes[2] = hashes[7]  # a validation image with the bytes of another test image
    hashes[8] = hashes[9]  # copies within the training images are allowed
    parts = split(splits=splits, hashes=hashes)
    assert not parts["train"] & {"cat.0.jpg", "cat.4.jpg"} and "cat.2.jpg" not in parts["val"]
    assert [len(parts[part]) for part in ("train", "val", "test")] == [48, 24, 25]
    said = capsys.readouterr().out
    assert "data: 2 images are copies of test images and left out of train\n" in said
    assert "data: 1 image is a copy of test images and left out of val\n" in said


def test_copies_are_left_out_without_a_test_folder():
    plain = split()
    twin = next(iter(sorted(plain["test"])))
    other = next(iter(sorted(plain["train"])))
    hashes = ["twin" if name.rsplit("/")[-1] in (twin, other) else name for name in NAMES]
    parts = split(hashes=hashes)
    assert parts["test"] == plain["test"]
    assert other not in parts["train"] | parts["val"]
