"""Every layout that `layouts.find` accepts, and the message for each one that it refuses.

`find` opens no image, so empty files stand in for them.
"""

import re
import unicodedata

import pytest

from utils import studies
from utils.data import layouts
from utils.errors import UserError, printable


def tree(root, *names):
    """Create empty files `names` below `root`; return `root`."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def labelled(folder):
    """Return {name: (class, split)}."""
    return {image.name: (folder.classes[image.label], image.split) for image in folder.images}


def refused(path, classes=None):
    """Return the message of the UserError that `find` raises: at most two lines."""
    with pytest.raises(UserError) as caught:
        layouts.find(path, classes)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


# ---- layouts


@pytest.mark.parametrize("doubled", [False, True])
def test_kaggle_cat_and_dog(tmp_path, doubled):
    train, test = (
        ("training_set/training_set", "test_set/test_set")
        if doubled
        else ("training_set", "test_set")
    )
    root = tree(
        tmp_path / "archive",
        f"{train}/cats/cat.1.jpg",
        f"{train}/cats/_DS_Store",
        f"{train}/dogs/dog.1.jpg",
        f"{test}/cats/cat.4001.jpg",
        f"{test}/dogs/dog.4001.jpg",
    )
    folder = layouts.find(root)
    assert labelled(folder) == {
        f"{test}/cats/cat.4001.jpg": ("cat", "test"),
        f"{test}/dogs/dog.4001.jpg": ("dog", "test"),
        f"{train}/cats/cat.1.jpg": ("cat", "train"),
        f"{train}/dogs/dog.1.jpg": ("dog", "train"),
    }
    assert [image.name for image in folder.images] == sorted(labelled(folder))
    assert [image.label for image in folder.images] == [0, 1, 0, 1]
    assert all(
        image.path == root / image.name and image.path.is_absolute() for image in folder.images
    )
    assert (folder.layout, folder.study) == ("Kaggle Cat and Dog", "cats_and_dogs")
    assert (folder.root, folder.classes, folder.ignored) == (root, ("cat", "dog"), 1)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("classes", [None, ("Dogs", "cat")])
def test_the_dissertations_download(tmp_path, inside, classes):
    """The folders of Kaggle's d4rklucif3r/cat-and-dogs; --data is the outer or inner folder."""
    names = [
        "training_set/cats/cat.1.jpg",
        "training_set/dogs/dog.1.jpg",
        "test_set/cats/cat.4001.jpg",
        "test_set/dogs/dog.4001.jpg",
    ]
    single = ("single_prediction/cat_or_dog_1.jpg", "single_prediction/cat_or_dog_2.jpg")
    root = tree(tmp_path / "cat-and-dogs" / "dataset", *names, *single)
    folder = layouts.find(root if inside else root.parent, classes)
    prefix = "" if inside else "dataset/"
    assert sorted(labelled(folder)) == sorted(prefix + name for name in names)
    assert (folder.layout, folder.study) == ("Kaggle Cat and Dog", "cats_and_dogs")
    assert (folder.classes, folder.ignored) == (("cat", "dog"), 2)


def test_stray_folder_next_to_the_splits_is_ignored(tmp_path):
    names = [
        f"{split}/{kind}s/{kind}.1.jpg"
        for split in ("training_set", "test_set")
        for kind in ("cat", "dog")
    ]
    folder = layouts.find(tree(tmp_path, *names, "single_prediction/cat_or_dog_1.jpg"))
    assert sorted(labelled(folder)) == sorted(names)
    assert (folder.layout, folder.ignored) == ("Kaggle Cat and Dog", 1)


COMPETITION = (
    "train/cat.0.jpg",
    "train/cat.1.jpg",
    "train/dog.0.jpg",
    "test1/1.jpg",
    "test1/2.jpg",
    "sample.csv",
)


@pytest.mark.parametrize("doubled", [False, True])
def test_kaggle_competition(tmp_path, doubled):
    names = [
        re.sub(r"^(train|test1)/", r"\1/\1/", name) if doubled else name for name in COMPETITION
    ]
    folder = layouts.find(tree(tmp_path / "dogs-vs-cats", *names))
    assert list(labelled(folder).values()) == [("cat", "train"), ("cat", "train"), ("dog", "train")]
    assert (folder.layout, folder.study, folder.ignored) == (
        "Kaggle Dogs vs. Cats: train from train",
        "dogs_vs_cats",
        3,
    )


def test_flat_folder_of_the_kaggle_competition(tmp_path):
    folder = layouts.find(tree(tmp_path, *COMPETITION) / "train")
    assert labelled(folder) == {
        "cat.0.jpg": ("cat", None),
        "cat.1.jpg": ("cat", None),
        "dog.0.jpg": ("dog", None),
    }
    assert (folder.layout, folder.study, folder.ignored) == ("Kaggle Dogs vs. Cats", "train", 0)


@pytest.mark.parametrize("inside", [True, False])
def test_petimages(tmp_path, inside):
    names = ("Cat/0.jpg", "Cat/666.jpg", "Cat/Thumbs.db", "Dog/0.jpg", "Dog/Thumbs.db")
    tree(tmp_path / "kagglecatsanddogs" / "PetImages", *names)
    root = tmp_path / "kagglecatsanddogs"
    tree(root, *(() if inside else ("readme[1].txt",)))
    folder = layouts.find(root / "PetImages" if inside else root)
    assert list(labelled(folder).values()) == [("cat", None), ("cat", None), ("dog", None)]
    assert folder.layout == "Microsoft PetImages"
    assert folder.study == ("petimages" if inside else "kagglecatsanddogs")
    assert folder.ignored == (2 if inside else 3)


ALIASES = {
    "train": (
        "train", "training", "training_set", "Train", "train_data", "TrainData", "trainset",
        "train-images", "train2017", "Training Set", "images_train", "imgs.train", "data train 2",
    ),
    "val": (
        "val", "valid", "validation", "validation_set", "dev", "val2017", "ValData", "valset",
        "validation-images", "Validation Data",
    ),
    "test": (
        "test", "test_set", "testing", "test1", "TEST", "test_data", "testing_set", "TestSet",
        "testset", "test-photos", "tst",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("split", "alias"), [(split, alias) for split, names in ALIASES.items() for alias in names]
)
def test_split_aliases(tmp_path, split, alias):
    other = {"train": "val", "val": "train", "test": "train"}[split]
    names = [f"{part}/{kind}/1.jpg" for part in (alias, other) for kind in ("Cats", "DOG")]
    folder = layouts.find(tree(tmp_path / "pets", *names))
    assert labelled(folder) == {
        f"{alias}/Cats/1.jpg": ("cat", split),
        f"{alias}/DOG/1.jpg": ("dog", split),
        f"{other}/Cats/1.jpg": ("cat", other),
        f"{other}/DOG/1.jpg": ("dog", other),
    }
    train, second = (alias, other) if split == "train" else (other, alias)
    part = other if split == "train" else split
    described = f"train from {train}, {part} from {second}"
    assert (folder.layout, folder.study) == (f"split and class folders: {described}", "pets")


@pytest.mark.parametrize("prefix", ["images", "data/v2", "Dogs and Cats"])
def test_splits_below_another_folder(tmp_path, prefix):
    names = [
        f"{prefix}/{part}/{kind}/1.jpg"
        for part in ("train", "validation", "test")
        for kind in ("cat", "dog")
    ]
    folder = layouts.find(tree(tmp_path, *names))
    assert [image.split for image in folder.images] == ["test"] * 2 + ["train"] * 2 + ["val"] * 2


LOOK_ALIKE = (
    "train_v1_old", "not_train", "traintest", "holdout", "eval", "Evaluation Set", "train_and_test",
    "unseen", "cats_and_dogs_test",
)  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKE)
@pytest.mark.parametrize("other", ["train", "photos"])
def test_a_folder_that_only_looks_like_a_split_is_refused(tmp_path, name, other):
    names = [f"{part}/{kind}/1.jpg" for part in (name, other) for kind in ("cat", "dog")]
    if name == "traintest":  # one word that begins like a split, and is none
        assert layouts.find(tree(tmp_path, *names))
        return
    message = refused(tree(tmp_path, *names))
    assert f"the folder {name} looks like a split" in message
    assert ("recognised: train" in message) == (other == "train")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_names_are_one_class(tmp_path, form):
    names = [
        "train/Kätzchen/a.jpg", f"test/{unicodedata.normalize(form, 'Kätzchen')}/ä.jpg",
        "train/Hündchen/b.jpg", f"test/{unicodedata.normalize(form, 'Hündchen')}/b.jpg",
    ]  # fmt: skip
    folder = layouts.find(tree(tmp_path, *names))
    assert folder.classes == ("hündchen", "kätzchen") and len(folder.images) == 4
    assert all(unicodedata.is_normalized("NFC", image.name) for image in folder.images)
    assert all(image.path.is_file() for image in folder.images)
    wanted = unicodedata.normalize(form, "Hündchen"), "kätzchen"
    assert layouts.find(tmp_path, wanted).classes == folder.classes


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_file_names_are_one_class(tmp_path, form):
    names = ["hündin.1.jpg", "katze.1.jpg", unicodedata.normalize(form, "hündin.2.jpg")]
    folder = layouts.find(tree(tmp_path, *names))
    assert [image.label for image in folder.images] == [0, 0, 1]


def test_folder_above_the_root_is_not_a_split(tmp_path):
    root = tree(tmp_path / "test" / "pets", "cat/1.jpg", "dog/1.jpg")
    assert {image.split for image in layouts.find(root).images} == {None}


def test_innermost_split_counts(tmp_path):
    names = [f"test/train/{kind}/val.jpg" for kind in ("cat", "dog")]
    assert {image.split for image in layouts.find(tree(tmp_path, *names)).images} == {"train"}


def test_class_folders_next_to_a_test_folder_are_for_training(tmp_path):
    folder = layouts.find(
        tree(tmp_path, "cat/1.jpg", "dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg")
    )
    assert [image.split for image in folder.images] == ["train", "train", "test", "test"]


def test_other_classes_keep_their_names_in_lower_case(tmp_path):
    folder = layouts.find(tree(tmp_path / "Fruit (2024)", "Pears/1.jpg", "apples/1.jpg"))
    assert folder.classes == ("apples", "pears")
    assert (folder.layout, folder.study) == ("class folders", "fruit_2024")


# ---- folder names before file names


def test_file_names_count_if_one_folder_holds_all(tmp_path):
    folder = layouts.find(
        tree(tmp_path, "images/cat_1.jpg", "images/Dog12.png", "images/readme.txt")
    )
    assert labelled(folder) == {
        "images/Dog12.png": ("dog", None),
        "images/cat_1.jpg": ("cat", None),
    }
    assert (folder.layout, folder.ignored) == ("Kaggle Dogs vs. Cats", 1)


def test_file_names_do_not_count_in_a_class_folder(tmp_path):
    message = refused(tree(tmp_path, "cats/cat.1.jpg", "cats/dog.1.jpg"))
    assert "found 1 class: cat (2 images)" in message


def test_file_names_do_not_overrule_three_folders(tmp_path):
    tree(tmp_path, "cats/IMG_1.jpg", "dogs/DSC_2.jpg", "birds/IMG_3.jpg")
    message = refused(tmp_path)
    assert all(text in message for text in ("3 classes", "bird", "cat (1 image)", "dog (1 image)"))


@pytest.mark.parametrize("split", ["train/", ""])
def test_three_folders_of_files_named_cat_and_dog_are_three_classes(tmp_path, split):
    kinds = {"husky": 3, "fox": 2, "wolf": 1}
    names = [
        f"{kind}/{file}.{n}.jpg"
        for kind, count in kinds.items()
        for n in range(count)
        for file in ("cat", "dog")
    ]
    message = refused(tree(tmp_path, *(split + name for name in names)))
    assert message == (
        f"{tmp_path}: found 3 classes: husky (6 images), fox (4 images), wolf (2 images).\n"
        "Choose two with --classes A B, for example --classes fox husky"
    )
    folder = layouts.find(tmp_path, ("fox", "husky"))
    assert [kind for kind, _ in labelled(folder).values()] == ["fox"] * 4 + ["husky"] * 6


def test_two_folders_of_files_named_cat_and_dog(tmp_path):
    folder = layouts.find(
        tree(tmp_path, "fox/cat.1.jpg", "fox/dog.1.jpg", "wolf/cat.1.jpg", "wolf/dog.1.jpg")
    )
    assert [kind for kind, _ in labelled(folder).values()] == ["fox", "fox", "wolf", "wolf"]
    assert folder.layout == "class folders"


def test_three_classes_of_file_names(tmp_path):
    tree(
        tmp_path,
        "images/cat.1.jpg",
        "images/cat.2.jpg",
        "images/dog.1.jpg",
        "images/dog.2.jpg",
        "images/fox.1.jpg",
    )
    for path in (tmp_path, tmp_path / "images"):
        assert "found 3 classes" in refused(path)
        assert "--classes cat dog" in refused(path)
        assert [kind for kind, _ in labelled(layouts.find(path, ("fox", "dog"))).values()] == [
            "dog",
            "dog",
            "fox",
        ]


# ---- two chosen classes


ANIMALS = (
    "fox/1.jpg",
    "fox/2.jpg",
    "Wolf/1.jpg",
    "cats/1.jpg",
    "cats/2.jpg",
    "cats/3.jpg",
    "readme.txt",
)


@pytest.mark.parametrize("classes", [("fox", "wolf"), ("WOLF", "Fox")])
def test_chosen_classes(tmp_path, classes):
    folder = layouts.find(tree(tmp_path / "Animals", *ANIMALS), classes)
    assert labelled(folder) == {
        "Wolf/1.jpg": ("wolf", None),
        "fox/1.jpg": ("fox", None),
        "fox/2.jpg": ("fox", None),
    }
    assert (folder.classes, folder.study, folder.ignored) == (
        ("fox", "wolf"),
        "animals_fox_wolf",
        4,
    )


def test_chosen_cats_are_the_class_cat(tmp_path):
    root = tree(tmp_path / "animals", *ANIMALS)
    for name in ("cats", "Cat"):
        folder = layouts.find(root, (name, "fox"))
        assert (folder.classes, folder.study) == (("cat", "fox"), "animals_cat_fox")


def test_choosing_the_only_classes_changes_nothing(tmp_path):
    root = tree(tmp_path / "pets", "cats/1.jpg", "dogs/1.jpg", "readme.txt")
    assert layouts.find(root, ("dog", "cat")) == layouts.find(root)


def test_only_the_splits_of_the_chosen_classes_count(tmp_path):
    tree(
        tmp_path / "zoo",
        "cat/1.jpg",
        "dog/1.jpg",
        "test/fox/1.jpg",
        "train/fox/1.jpg",
        "train/wolf/1.jpg",
    )
    folder = layouts.find(tmp_path / "zoo", ("cat", "dog"))
    assert labelled(folder) == {"cat/1.jpg": ("cat", None), "dog/1.jpg": ("dog", None)}
    assert (folder.study, folder.ignored) == ("zoo_cat_dog", 3)
    assert "no wolf images among those for test" in refused(tmp_path / "zoo", ("fox", "wolf"))


def test_chosen_classes_in_file_names(tmp_path):
    root = tree(tmp_path / "fruit", "photos/apple_1.jpg", "photos/pear_1.jpg", "photos/kiwi_1.jpg")
    folder = layouts.find(root, ("pear", "apple"))
    assert labelled(folder) == {
        "photos/apple_1.jpg": ("apple", None),
        "photos/pear_1.jpg": ("pear", None),
    }
    assert (folder.study, folder.layout, folder.ignored) == (
        "fruit_apple_pear",
        "files named by class",
        1,
    )


def test_cats_and_dogs_chosen_from_more_are_not_the_dissertations(tmp_path):
    names = [
        f"{split}/{kind}/1.jpg"
        for split in ("training_set", "test_set")
        for kind in ("cats", "dogs", "fox")
    ]
    folder = layouts.find(tree(tmp_path / "cats_and", *names), ("cats", "dogs"))
    described = "split and class folders: train from training_set, test from test_set"
    assert (folder.layout, folder.study) == (described, "cats_and_cat_dog")
    folder = layouts.find(tree(tmp_path / "cats_and_dogs", *names), ("cats", "dogs"))
    assert folder.study == "data_cats_and_dogs_cat_dog"


def test_absent_class(tmp_path):
    root = tree(tmp_path / "animals", *ANIMALS)
    there = "only of cat (3 images), fox (2 images), wolf (1 image)."
    assert (
        refused(root, ("Fox", "Bear"))
        == f"--classes Fox Bear: {root} has no images of Bear, {there}"
    )
    assert refused(root, ("polar bear", "elk")) == (
        f"--classes 'polar bear' elk: {root} has no images of polar bear or elk, {there}"
    )


def test_one_class_twice(tmp_path):
    root = tree(tmp_path / "animals", *ANIMALS)
    assert refused(root, ("cats", "Cat")) == "--classes cats Cat: give two different classes."


def test_offered_classes_are_quoted_for_the_shell(tmp_path):
    root = tree(
        tmp_path / "animals",
        "polar bear/1.jpg",
        "polar bear/2.jpg",
        "elk/1.jpg",
        "elk/2.jpg",
        "fox/1.jpg",
    )
    message = refused(root)
    assert message.endswith("for example --classes elk 'polar bear'")
    assert layouts.find(root, ("elk", "polar bear")).study == "animals_elk_polar_bear"


# ---- files, links and names


def test_suffixes_and_hidden_files(tmp_path):
    images = [f"{kind}/1{suffix}" for kind in ("cat", "dog") for suffix in layouts.SUFFIXES]
    images += ["cat/2.JPG", "dog/2.JpEg"]
    assert {"cat/1.jfif", "dog/1.jpe", "cat/1.avif", "cat/1.heic"} < set(images)
    hidden = [
        ".git/cat/1.jpg",
        "cat/._1.jpg",
        "dog/.hidden/2.jpg",
        "__MACOSX/cat/1.jpg",
        ".DS_Store",
    ]
    folder = layouts.find(tree(tmp_path, *images, *hidden, "cat/1.jpg.txt", "cat/Thumbs.db"))
    assert sorted(labelled(folder)) == sorted(images)
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
    assert sorted(labelled(folder)) == [
        "test/cats/1.jpg",
        "test/dogs/1.jpg",
        "train/cats/1.jpg",
        "train/dogs/1.jpg",
    ]
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
        ("drawn cats", "drawn_cats"),
        ("cats_and_dogs", "data_cats_and_dogs"),
        ("Cats and Dogs 2024", "data_cats_and_dogs_2024"),
        ("cats_and_dogs_1a2b3c4d", "data_cats_and_dogs_1a2b3c4d"),
        ("Pets smoke", "data_petssmoke"),
        ("smoke_smoke", "data_smokesmoke"),
        ("cats and dogs smoke", "data_cats_and_dogssmoke"),
        ("smoke", "smoke"),
        ("кошки", "data"),
        ("--Dogs vs. Cats--", "dogs_vs_cats"),
    ],
)
def test_study_names(tmp_path, name, study):
    assert layouts.find(tree(tmp_path / name, "cat/1.jpg", "dog/1.jpg")).study == study
    assert re.fullmatch("[a-z0-9_]+", study)
    assert not study.endswith("_smoke")
    assert not studies.is_dissertations(study)


@pytest.mark.parametrize(
    ("name", "classes", "study"),
    [
        ("animals", ("fox", "smoke"), "data_animals_foxsmoke"),
        ("cats", ("and", "dogs_2"), "data_cats_and_dogs_2"),
        ("звери", ("fox", "wolf"), "fox_wolf"),
        ("animals", ("лиса", "волк"), "animals"),
    ],
)
def test_study_names_with_chosen_classes(tmp_path, name, classes, study):
    root = tree(tmp_path / name, *(f"{kind}/1.jpg" for kind in (*classes, "other")))
    assert layouts.find(root, classes).study == study


# ---- refusals


def test_no_folder_file_archive(tmp_path):
    tree(tmp_path, "pets.zip", "notes.txt")
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(tmp_path / "nowhere")
    assert "is an archive: unpack it" in refused(tmp_path / "pets.zip")
    assert "is a file: give the folder" in refused(tmp_path / "notes.txt")
    assert "cannot read" in refused(tmp_path / ("x" * 300))


def test_no_images(tmp_path):
    assert "no images in" in refused(tmp_path)
    assert "Expected two classes" in refused(tmp_path)
    assert "Unpack train.zip first" in refused(tree(tmp_path, "train.zip", "test1.txt"))


@pytest.mark.parametrize("classes", [None, ("cat", "dog")])
def test_no_labels(tmp_path, classes):
    message = refused(tree(tmp_path, "test1/1.jpg", "test1/2.jpg"), classes)
    assert "2 images, for example test1/1.jpg, but none carries a label" in message
    assert "Expected two classes" in message


def test_one_class_and_many(tmp_path):
    assert "found 1 class: cat (2 images)" in refused(
        tree(tmp_path / "one", "cats/1.jpg", "cats/2.jpg")
    )
    many = tree(tmp_path / "many", *(f"kind{number:02}/1.jpg" for number in range(28)))
    assert "found 28 classes: " in refused(many)
    assert " and 23 more." in refused(many)
    assert " and 8 more." in refused(many, ("kind00", "other"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_missing_in_a_split(tmp_path, split):
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


@pytest.mark.parametrize("name", ["\x1b[31mdog", "dog\nerror: all is lost", "dog\u202egod"])
def test_a_class_name_with_control_characters_is_refused(tmp_path, name):
    message = refused(tree(tmp_path, "cat/1.jpg", f"{name}/1.jpg"))
    assert (
        "characters that cannot be printed. Rename its folder" in message
        and printable(message, keep="\n") == message
    )


def test_folders_nested_too_deep_are_refused(tmp_path):
    """Only so deep that pytest, which removes its folders recursively, can remove them."""
    tree(
        tmp_path, "cat/1.jpg", "dog/1.jpg", "/".join(["folder"] * (layouts.DEEPEST + 50)) + "/1.jpg"
    )
    assert "more than 100 nested folders" in refused(tmp_path)


def test_a_folder_linked_into_itself_many_times_is_read_once(tmp_path):
    tree(tmp_path, "cat/1.jpg", "dog/1.jpg")
    for number in range(50):
        (tmp_path / f"again{number}").symlink_to(tmp_path)
    assert len(layouts.find(tmp_path).images) == 2


def test_a_third_class_next_to_files_named_by_class_is_named(tmp_path):
    message = refused(tree(tmp_path, "cat.1.jpg", "dog.1.jpg", "bird.1.jpg"))
    assert "found 3 classes: bird (1 image), cat (1 image), dog (1 image)" in message
