"""Near-duplicates of test images: what counts as one, and what does not."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from utils.cli import Options
from utils.data import duplicates, loading, synthetic
from utils.errors import UserError


def photograph(seed):
    """A picture with structure at all scales, uint8 (300, 400, 3)."""
    generator = np.random.default_rng(seed)
    picture = np.zeros((300, 400, 3))
    for size in (2, 5, 10, 25):
        small = generator.normal(0, size, (300 // size // 4 + 1, 400 // size // 4 + 1, 3))
        image = [
            Image.fromarray(channel).resize((400, 300)) for channel in small.transpose(2, 0, 1)
        ]
        picture += np.stack([np.asarray(channel) for channel in image], axis=2)
    picture -= picture.min()
    return (255 * picture / picture.max()).astype(np.uint8)


def decoded(image):
    """A picture as the data set holds it, uint8 (224, 224, 3)."""
    return np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))


def compressed(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def resized(image, *size):
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


COPIES = {
    "smaller": lambda image: resized(image, 100, 75),
    "squeezed": lambda image: resized(image, 200, 200),
    "as a poor JPEG": lambda image: compressed(image, 20),
    "smaller as a JPEG": lambda image: compressed(resized(image, 200, 150), 50),
    "brighter": lambda image: np.clip(image * 1.2, 0, 255).astype(np.uint8),
    "in grey": lambda image: np.asarray(Image.fromarray(image).convert("L").convert("RGB")),
    "mirrored": lambda image: image[:, ::-1],
}
OTHERS = {
    "another picture": lambda image: photograph(999),
    "its negative": lambda image: 255 - image,
    "upside down": lambda image: image[::-1],
    "one colour": lambda image: np.full_like(image, 90),
    "another one with its colours": lambda image: np.roll(image, (150, 200), (0, 1)),
}


def with_copies(change):
    """The images 0 to 3 in which 3 is a changed copy of 1."""
    pictures = [photograph(seed) for seed in range(3)]
    images = np.stack([decoded(picture) for picture in [*pictures, change(pictures[1])]])
    return duplicates.find(images, np.array([3]), np.array([0, 1, 2]))


@pytest.mark.parametrize("name", COPIES)
def test_changed_copies_are_recognised(name):
    ((test, other, alike),) = with_copies(COPIES[name])
    assert (test, other) == (3, 1) and alike > duplicates.ALIKE


@pytest.mark.parametrize("name", OTHERS)
def test_other_images_are_not_taken_for_copies(name):
    assert with_copies(OTHERS[name]) == []


def test_pictures_of_one_colour_are_not_copies_of_each_other():
    images = np.stack([np.full((224, 224, 3), grey, np.uint8) for grey in (10, 10, 200)])
    assert duplicates.find(images, np.array([0]), np.array([1, 2])) == []


def test_drawn_images_have_no_near_duplicates():
    images = np.stack([synthetic.draw(0, index)[0] for index in range(80)])
    assert duplicates.find(images, np.arange(20), np.arange(20, 80)) == []


@pytest.fixture
def source(tmp_path):
    """Load a data set in which test image 9 is training image 3, smaller."""

    def source(copy=True):
        for number in range(10):
            for label, kind in enumerate(("cat", "dog")):
                picture = photograph(100 * label + number)
                if copy and (number, kind) == (9, "dog"):
                    picture = compressed(resized(photograph(103), 200, 150), 60)
                part = "test" if number > 6 else "train"
                path = tmp_path / "pets" / part / kind / f"{kind}.{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
        options = Options(
            ("native",), data=str(tmp_path / "pets"), results=tmp_path / "out",
            checkpoints=tmp_path / "weights",
        )  # fmt: skip
        return loading.load_images(options)

    return source


def test_they_are_named_counted_and_recorded(source, capsys):
    data = source()
    (pair,) = data.near_duplicates
    assert (pair.test, pair.other) == ("test/dog/dog.9.png", "train/dog/dog.3.png")
    said = capsys.readouterr().out
    assert "data: 1 test image is nearly equal" in said and "test/dog/dog.9.png" in said
    described = data.describe()
    assert described["near_duplicates"] == 1
    assert described["near_duplicate_pairs"] == [[*pair]]
    assert described["layout"] == "split and class folders: train from train, test from test"
    assert data.without_duplicates.sum() == len(data.test) - 1  # the split stays


def test_they_are_found_once(source, monkeypatch):
    first = source()
    monkeypatch.setattr(duplicates, "find", None)
    assert source().near_duplicates == first.near_duplicates


def test_a_data_set_without_any_says_nothing(source, capsys):
    data = source(copy=False)
    assert data.near_duplicates == () and data.without_duplicates.all()
    assert "nearly equal" not in capsys.readouterr().out


def test_a_read_only_folder_of_images_is_no_obstacle(source, monkeypatch):
    def refuse(path, content):
        raise UserError(f"cannot write {path}: Read-only file system.")

    monkeypatch.setattr(duplicates.checksums, "write", refuse)
    stored = SimpleNamespace(
        images=np.stack([decoded(photograph(seed)) for seed in (1, 1, 2)]), digest="0" * 64,
        names=("a", "b", "c"),
    )  # fmt: skip
    index = {"train": np.array([1]), "val": np.array([2]), "test": np.array([0])}
    (pair,) = duplicates.of_source(stored, index, Path("nowhere"))
    assert (pair.test, pair.other) == ("a", "b")
