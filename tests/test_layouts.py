"""Every layout that `utils.layouts.find` promises to take, and what it says about those that it cannot.

`find` opens no image, so empty files stand in for them.
"""

import re

import pytest

from utils import layouts
from utils.errors import UserError


def tree(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def found(folder):
    """Return {name: (class, split)}."""
    return {image.name: (folder.classes[image.label], image.split) for image in folder.images}


def refused(path):
    with pytest.raises(UserError) as caught:
        layouts.find(path)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("doubled", [False, True])
def test_kaggle_cat_and_dog(tmp_path, doubled):
    train, test = ("training_set/training_set", "test_set/test_set") if doubled else ("training_set", "test_set")
    root = tree(
        tmp_path / "archive",
        f"{train}/cats/cat.1.jpg",
        f"{train}/cats/_DS_Store",
        f"{train}/dogs/dog.1.jpg",
        f"{test}/cats/cat.4001.jpg",
        f"{test}/dogs/dog.4001.jpg",
    )
    folder = layouts.find(root)
    assert found(folder) == {
        f"{test}/cats/cat.4001.jpg": ("cat", "test"),
        f"{test}/dogs/dog.4001.jpg": ("dog", "test"),
        f"{train}/cats/cat.1.jpg": ("cat", "train"),
        f"{train}/dogs/dog.1.jpg": ("dog", "train"),
    }
    assert [image.name for image in folder.images] == sorted(found(folder))
    assert [image.label for image in folder.images] == [0, 1, 0, 1]
    assert all(image.path == root / image.name and image.path.is_absolute() for image in folder.images)
    assert (folder.layout, folder.study) == ("Kaggle Cat and Dog", "cats_and_dogs")
    assert (folder.root, folder.classes, folder.ignored) == (root, ("cat", "dog"), 1)


def test_a_stray_folder_beside_the_splits_is_ignored(tmp_path):
    names = [f"{split}/{kind}s/{kind}.1.jpg" for split in ("training_set", "test_set") for kind in ("cat", "dog")]
    folder = layouts.find(tree(tmp_path, *names, "single_prediction/cat_or_dog_1.jpg"))
    assert sorted(found(folder)) == sorted(names)
    assert (folder.layout, folder.ignored) == ("Kaggle Cat and Dog", 1)


COMPETITION = ("train/cat.0.jpg", "train/cat.1.jpg", "train/dog.0.jpg", "test1/1.jpg", "test1/2.jpg", "sample.csv")


@pytest.mark.parametrize("doubled", [False, True])
def test_kaggle_competition(tmp_path, doubled):
    names = [re.sub(r"^(train|test1)/", r"\1/\1/", name) if doubled else name for name in COMPETITION]
    folder = layouts.find(tree(tmp_path / "dogs-vs-cats", *names))
    assert list(found(folder).values()) == [("cat", "train"), ("cat", "train"), ("dog", "train")]
    assert (folder.layout, folder.study, folder.ignored) == ("Kaggle Dogs vs. Cats", "dogs_vs_cats", 3)


def test_kaggle_competition_flat_folder_itself(tmp_path):
    folder = layouts.find(tree(tmp_path, *COMPETITION) / "train")
    assert found(folder) == {"cat.0.jpg": ("cat", None), "cat.1.jpg": ("cat", None), "dog.0.jpg": ("dog", None)}
    assert (folder.layout, folder.study, folder.ignored) == ("Kaggle Dogs vs. Cats", "train", 0)


def test_file_names_count_where_one_folder_holds_all(tmp_path):
    folder = layouts.find(tree(tmp_path, "images/cat_1.jpg", "images/Dog12.png", "images/readme.txt"))
    assert found(folder) == {"images/Dog12.png": ("dog", None), "images/cat_1.jpg": ("cat", None)}
    assert folder.ignored == 1


@pytest.mark.parametrize("inside", [True, False])
def test_petimages(tmp_path, inside):
    names = ("Cat/0.jpg", "Cat/666.jpg", "Cat/Thumbs.db", "Dog/0.jpg", "Dog/Thumbs.db")
    tree(tmp_path / "kagglecatsanddogs" / "PetImages", *names)
    root = tmp_path / "kagglecatsanddogs"
    tree(root, *(() if inside else ("readme[1].txt",)))
    folder = layouts.find(root / "PetImages" if inside else root)
    assert list(found(folder).values()) == [("cat", None), ("cat", None), ("dog", None)]
    assert folder.layout == "Microsoft PetImages"
    assert folder.study == ("petimages" if inside else "kagglecatsanddogs")
    assert folder.ignored == (2 if inside else 3)


ALIASES = {
    "train": ("train", "training", "training_set", "Train"),
    "val": ("val", "valid", "validation", "validation_set", "dev"),
    "test": ("test", "test_set", "testing", "test1", "TEST"),
}


@pytest.mark.parametrize(("split", "alias"), [(split, alias) for split, names in ALIASES.items() for alias in names])
def test_split_aliases(tmp_path, split, alias):
    other = {"train": "val", "val": "train", "test": "train"}[split]
    names = [f"{part}/{kind}/1.jpg" for part in (alias, other) for kind in ("Cats", "DOG")]
    folder = layouts.find(tree(tmp_path / "pets", *names))
    assert found(folder) == {
        f"{alias}/Cats/1.jpg": ("cat", split),
        f"{alias}/DOG/1.jpg": ("dog", split),
        f"{other}/Cats/1.jpg": ("cat", other),
        f"{other}/DOG/1.jpg": ("dog", other),
    }
    assert (folder.layout, folder.study) == ("split and class folders", "pets")


def test_a_folder_above_the_root_is_no_split(tmp_path):
    root = tree(tmp_path / "test" / "pets", "cat/1.jpg", "dog/1.jpg")
    assert {image.split for image in layouts.find(root).images} == {None}


def test_the_innermost_split_counts(tmp_path):
    names = [f"test/train/{kind}/val.jpg" for kind in ("cat", "dog")]
    assert {image.split for image in layouts.find(tree(tmp_path, *names)).images} == {"train"}


def test_class_folders_beside_a_test_folder_are_for_training(tmp_path):
    folder = layouts.find(tree(tmp_path, "cat/1.jpg", "dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg"))
    assert [image.split for image in folder.images] == ["train", "train", "test", "test"]


def test_other_classes_keep_their_names_in_lower_case(tmp_path):
    folder = layouts.find(tree(tmp_path / "Fruit (2024)", "Pears/1.jpg", "apples/1.jpg"))
    assert folder.classes == ("apples", "pears")
    assert (folder.layout, folder.study) == ("class folders", "fruit_2024")


def test_file_names_do_not_overrule_three_folders(tmp_path):
    tree(tmp_path, "cats/IMG_1.jpg", "dogs/DSC_2.jpg", "birds/IMG_3.jpg")
    message = refused(tmp_path)
    assert all(text in message for text in ("3 classes", "bird", "cat (1 images)", "dog (1 images)", "Expected two"))


def test_suffixes_and_hidden_files(tmp_path):
    images = [f"{kind}/1{suffix}" for kind in ("cat", "dog") for suffix in layouts.SUFFIXES]
    images += ["cat/2.JPG", "dog/2.JpEg"]
    hidden = [".git/cat/1.jpg", "cat/._1.jpg", "dog/.hidden/2.jpg", "__MACOSX/cat/1.jpg", ".DS_Store"]
    folder = layouts.find(tree(tmp_path, *images, *hidden, "cat/1.jpg.txt", "cat/jpg"))
    assert sorted(found(folder)) == sorted(images)
    assert folder.ignored == 2


def test_links(tmp_path):
    tree(tmp_path / "store", "cats/1.jpg", "dogs/1.jpg")
    root = tmp_path / "pets"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for kind in ("cats", "dogs"):
            (root / split / kind).symlink_to(tmp_path / "store" / kind)
    (tmp_path / "store" / "cats" / "loop").symlink_to(tmp_path / "store" / "cats")
    (root / "train" / "top").symlink_to(root)
    (root / "train" / "self").symlink_to(root / "train" / "self")
    (root / "train" / "cats" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "link").symlink_to(root)
    folder = layouts.find(tmp_path / "link")
    assert sorted(found(folder)) == ["test/cats/1.jpg", "test/dogs/1.jpg", "train/cats/1.jpg", "train/dogs/1.jpg"]
    assert folder.study == "link"
    assert folder.ignored == 3  # self, and gone.jpg by two ways


def test_relative_path(tmp_path, monkeypatch):
    tree(tmp_path / "Pets", "cat/1.jpg", "dog/1.jpg")
    monkeypatch.chdir(tmp_path / "Pets")
    for path in (".", "../Pets", "cat/.."):
        folder = layouts.find(path)
        assert (folder.root, folder.study) == (tmp_path / "Pets", "pets")


@pytest.mark.parametrize(
    ("name", "study"),
    [
        ("drawn", "data_drawn"),
        ("cats_and_dogs", "data_cats_and_dogs"),
        ("Pets smoke", "data_petssmoke"),
        ("smoke_smoke", "data_smokesmoke"),
        ("smoke", "smoke"),
        ("кошки", "data"),
        ("--Dogs vs. Cats--", "dogs_vs_cats"),
    ],
)
def test_study_names(tmp_path, name, study):
    assert layouts.find(tree(tmp_path / name, "cat/1.jpg", "dog/1.jpg")).study == study
    assert re.fullmatch("[a-z0-9_]+", study)
    assert not study.endswith("_smoke")


def test_no_folder_file_archive(tmp_path):
    tree(tmp_path, "pets.zip", "notes.txt")
    assert refused(tmp_path / "nowhere") == f"no such folder: {tmp_path / 'nowhere'}"
    assert "is an archive: unpack it" in refused(tmp_path / "pets.zip")
    assert "is a file: give the folder" in refused(tmp_path / "notes.txt")
    assert "cannot read" in refused(tmp_path / ("x" * 300))


def test_no_images(tmp_path):
    assert "no images in" in refused(tmp_path)
    assert "Expected two classes" in refused(tmp_path)
    assert "Unpack train.zip first" in refused(tree(tmp_path, "train.zip", "test1.txt"))


def test_no_labels(tmp_path):
    message = refused(tree(tmp_path, "test1/1.jpg", "test1/2.jpg"))
    assert "2 images, such as test1/1.jpg, but none carries a label" in message


def test_one_class_and_many(tmp_path):
    assert "found 1 class: cat (2 images)" in refused(tree(tmp_path / "one", "cats/1.jpg", "cats/2.jpg"))
    many = tree(tmp_path / "many", *(f"kind{number}/1.jpg" for number in range(8)))
    assert "found 8 classes: " in refused(many)
    assert " and 3 more." in refused(many)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_missing_in_a_split(tmp_path, split):
    other = "test" if split == "train" else "train"
    tree(tmp_path, f"{split}/cat/1.jpg", f"{other}/cat/1.jpg", f"{other}/dog/1.jpg")
    assert f"no dog images among those for {split}." in refused(tmp_path)


def test_no_train_split(tmp_path):
    message = refused(tree(tmp_path, "test_set/cat/1.jpg", "test_set/dog/1.jpg"))
    assert "no images for train, only for test" in message
    assert layouts.find(tmp_path / "test_set").classes == ("cat", "dog")


def test_unreadable_folder(tmp_path, monkeypatch):
    tree(tmp_path, "cat/1.jpg", "dog/1.jpg")
    plain = layouts.os.scandir

    def scandir(folder):
        if folder.name == "dog":
            raise PermissionError(13, "Permission denied")
        return plain(folder)

    monkeypatch.setattr(layouts.os, "scandir", scandir)
    assert refused(tmp_path) == f"cannot read the folder {tmp_path / 'dog'}: Permission denied."
