"""`utils.data`: who trains, validates and tests; batches, augmentation and calibration images."""

import argparse
import hashlib
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import numbered_split, split_of
from utils import data
from utils.errors import UserError

CATS, DOGS = 40, 60
NAMES = [f"cat/cat.{n}.jpg" for n in range(CATS)] + [f"dog/dog.{n}.jpg" for n in range(DOGS)]
LABELS = [0] * CATS + [1] * DOGS


def split(names=NAMES, labels=LABELS, splits=None, hashes=None):
    """The parts as sets of file names without their folders."""
    splits, hashes = splits or [None] * len(names), hashes or [f"hash of {name}" for name in names]
    found = data.split(names, labels, splits, hashes)
    assert all(rows.dtype == np.int64 and np.array_equal(rows, np.unique(rows)) for rows in found.values())
    return {part: {names[i].rsplit("/")[-1] for i in rows} for part, rows in found.items()}


def count(names):
    return sum(name.startswith("cat") for name in names), sum(name.startswith("dog") for name in names)


# ---- split


def test_without_folders_a_fifth_tests_and_some_of_the_rest_validates():
    parts = split()
    assert {name: count(names) for name, names in parts.items()} == {"train": (27, 41), "val": (5, 7), "test": (8, 12)}
    assert sorted(name for names in parts.values() for name in names) == sorted(name.rsplit("/")[-1] for name in NAMES)


def test_the_test_images_are_those_whose_hashed_names_come_first():
    cats = sorted((f"cat.{n}.jpg" for n in range(CATS)), key=lambda name: hashlib.sha256(f"0:{name}".encode()).hexdigest())
    assert {name for name in split()["test"] if name.startswith("cat")} == set(cats[:8])


def test_the_order_of_the_files_does_not_matter():
    order = np.random.default_rng(0).permutation(len(NAMES))
    assert split([NAMES[i] for i in order], [LABELS[i] for i in order]) == split()


@pytest.mark.parametrize("folder", ["PetImages/{}", "{}s", "a/b/{}", "data set/{}"])
def test_the_names_of_the_folders_do_not_matter(folder):
    renamed = [f"{folder.format(name.split('/')[0])}/{name.split('/')[1]}" for name in NAMES]
    assert split(renamed) == split()


def test_classes_that_use_the_same_file_names_are_split_each_for_itself():
    names, labels = [f"{kind}/{n}.jpg" for kind in ("Cat", "Dog") for n in range(20)], [0] * 20 + [1] * 20
    found = data.split(names, labels, [None] * 40, names)
    assert np.array_equal(found["test"][:4] + 20, found["test"][4:])
    assert len(found["test"]) == 8


def test_a_class_of_few_images_is_still_tested():
    parts = split([*NAMES[:3], *NAMES[CATS:]], [0] * 3 + LABELS[CATS:])
    assert {name: count(names)[0] for name, names in parts.items()} == {"train": 1, "val": 1, "test": 1}


OWN_TEST = ["test" if n % 10 == 0 else "train" for n in range(100)]


def test_an_own_test_folder_is_respected():
    parts = split(splits=OWN_TEST)
    assert parts["test"] == {NAMES[i].rsplit("/")[-1] for i in range(0, 100, 10)}
    assert count(parts["val"]) == (round(0.15 * 36), round(0.15 * 54))
    assert not parts["val"] & parts["test"] and len(parts["train"]) == 90 - len(parts["val"])


def test_an_own_validation_folder_is_respected():
    splits = ["val" if n % 10 == 0 else "train" for n in range(100)]
    parts = split(splits=splits)
    assert parts["val"] == {NAMES[i].rsplit("/")[-1] for i in range(0, 100, 10)}
    assert count(parts["test"]) == (round(0.2 * 36), round(0.2 * 54))
    assert not parts["val"] & parts["test"]


def test_three_own_folders_are_taken_as_they_are():
    splits = [("train", "train", "val", "test")[n % 4] for n in range(100)]
    parts = split(splits=splits)
    for part in ("train", "val", "test"):
        assert parts[part] == {NAMES[i].rsplit("/")[-1] for i in range(100) if splits[i] == part}


def test_copies_of_test_images_are_left_out_of_training_and_validation(capsys):
    splits = [("train", "train", "val", "test")[n % 4] for n in range(100)]
    hashes = [str(n) for n in range(100)]
    hashes[0] = hashes[4] = hashes[3]  # two training images with the bytes of a test image
    hashes[2] = hashes[7]  # a validation image with those of another
    hashes[8] = hashes[9]  # copies within the training images are nobody's harm
    parts = split(splits=splits, hashes=hashes)
    assert not parts["train"] & {"cat.0.jpg", "cat.4.jpg"} and "cat.2.jpg" not in parts["val"]
    assert [len(parts[part]) for part in ("train", "val", "test")] == [48, 24, 25]
    said = capsys.readouterr().out
    assert "2 train images are copies of test images" in said and "1 val images are copies" in said


def test_copies_are_left_out_where_the_test_images_are_drawn_too():
    plain = split()
    twin = next(iter(sorted(plain["test"])))
    other = next(iter(sorted(plain["train"])))
    hashes = ["twin" if name.rsplit("/")[-1] in (twin, other) else name for name in NAMES]
    parts = split(hashes=hashes)
    assert parts["test"] == plain["test"]
    assert other not in parts["train"] | parts["val"]


# ---- Split: batches


def numbers(images):
    """The images of a `numbered_split` that are in a normalised batch."""
    red = images[:, 0, 0, 0] * data.STD[0] + data.MEAN[0]
    return [round(value) for value in (255 * red).tolist()]


def test_batch_is_pixels_from_zero_to_one_channels_last(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    batch = split_of(tmp_path, pixels, [0, 1] * 3, index=[1, 3, 5]).batch(np.array([2, 0]))
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 5, 4)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.numpy(), pixels[[5, 1]].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def test_a_batch_is_a_copy(tmp_path):
    split = numbered_split(tmp_path, [0, 1])
    split.batch(np.array([0, 1])).zero_()
    assert split.images[1].max() == 1


def test_batches_come_in_order_with_their_labels_to_the_last(tmp_path):
    labels = np.arange(20) % 3 % 2
    split = numbered_split(tmp_path, labels, index=range(1, 20, 2))
    batches = list(split.batches(4))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert [number for x, _ in batches for number in numbers(x)] == list(range(1, 20, 2))
    assert torch.cat([y for _, y in batches]).tolist() == labels[1::2].tolist() == split.y.tolist()
    assert batches[0][1].dtype == torch.int64


def test_normalize_by_hand():
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    expected = torch.tensor([-0.485 / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert torch.allclose(data.normalize(images), expected.view(1, 3, 1, 1).expand(2, 3, 2, 2), atol=1e-6)
    assert images[0, 0, 0, 0] == 0 and images[0, 2, 0, 0] == 1  # not in place


def epoch(split, seed, batch_size=8, **more):
    return list(split.shuffled(batch_size, seed, **more))


def test_an_epoch_shows_every_image_at_most_once_in_full_batches(tmp_path):
    labels = np.arange(45) % 2
    split = numbered_split(tmp_path, labels, index=range(3, 45))
    batches = epoch(split, 1)
    shown = [number for x, _ in batches for number in numbers(x)]
    assert [len(x) for x, _ in batches] == [8] * 5
    assert len(set(shown)) == 40 and set(shown) <= set(range(3, 45))
    assert shown != sorted(shown)
    assert torch.cat([y for _, y in batches]).tolist() == labels[shown].tolist()


def test_each_seed_has_its_own_order_and_leaves_out_other_images(tmp_path):
    split = numbered_split(tmp_path, np.arange(45) % 2)
    orders = [[number for x, _ in epoch(split, seed) for number in numbers(x)] for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert set(orders[0]) != set(orders[1])


def test_an_epoch_of_fewer_images_than_a_batch_is_one_batch(tmp_path):
    [(x, _)] = epoch(numbered_split(tmp_path, [0, 1, 0]), 0)
    assert sorted(numbers(x)) == [0, 1, 2]


def test_an_epoch_is_augmented_before_it_is_normalised_and_repeats_to_the_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    split = split_of(tmp_path, pixels, [0, 1] * 8)
    first, again, plain = (
        torch.cat([x for x, _ in epoch(split, 3, augmentation=how)])
        for how in (dict(crop=0.7, degrees=15), dict(crop=0.7, degrees=15), None)
    )
    assert torch.equal(first, again)
    assert (first - plain).abs().mean() > 0.1
    lowest, highest = (data.normalize(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    assert bool((first >= lowest - 1e-4).all() and (first <= highest + 1e-4).all())


# ---- Split: other processes, calibration


def test_pickled_as_a_file_name_and_reopened_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    split = split_of(tmp_path, pixels, np.arange(100) % 2, index=[5, 3, 99])
    packed = pickle.dumps(split)
    assert len(packed) < 10_000 < pixels.nbytes
    reopened = pickle.loads(packed)
    assert (reopened.names, reopened.y.tolist(), reopened.images.filename) == (split.names, [1, 1, 1], split.images.filename)
    assert torch.equal(reopened.batch(np.arange(3)), split.batch(np.arange(3)))
    with pytest.raises(ValueError, match="read-only"):
        reopened.images[0] = 0


def test_calibration_images_are_training_images_in_equal_parts_and_always_the_same(tmp_path):
    labels = np.array([0] * 70 + [1] * 30)
    train = numbered_split(tmp_path, labels, index=[i for i in range(100) if i % 5])
    chosen = train.sample(20)
    assert set(chosen.index) <= set(train.index) and len(set(chosen.index)) == 20
    assert np.bincount(chosen.y).tolist() == [10, 10]
    images = train.calibration(20)
    assert numbers(images) == chosen.index.tolist()
    assert torch.equal(images, data.normalize(train.batch(np.searchsorted(train.index, chosen.index))))
    assert torch.equal(images, train.calibration(20))


def test_calibration_images_are_chosen_by_name_and_not_by_place(tmp_path):
    split = numbered_split(tmp_path / "a", np.arange(40) % 2)
    order = np.random.default_rng(0).permutation(40)
    names = tuple(f"elsewhere/{split.names[i]}" for i in order)
    moved = data.Split(split.images[order], split.labels[order], names, np.arange(40))
    chosen = {names[i].rsplit("/")[-1] for i in moved.sample(10).index}
    assert chosen == {split.names[i] for i in split.sample(10).index}
    assert chosen != {split.names[i] for i in split.sample(10, seed=1).index}


def test_a_sample_fills_up_with_the_larger_class_and_is_no_more_than_there_is(tmp_path):
    split = numbered_split(tmp_path, [0] * 3 + [1] * 20)
    assert np.bincount(split.sample(10).y).tolist() == [3, 7]
    assert split.sample(100).index.tolist() == list(range(23))
    assert abs(np.diff(np.bincount(split.sample(5).y)).item()) == 1


# ---- augment


def augmented(images, crop, degrees, *uniform):
    """`augment` with these draws, each from 0 to 1: side, angle, mirror (0 is mirrored), shift right, shift down."""
    return data.augment(images, torch.tensor([uniform] * len(images), dtype=torch.float32), crop, degrees)


def draws(n):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def marked():
    """An image whose every pixel differs from the others, with nothing symmetrical in it."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_nothing_asked_is_nothing_done_but_mirroring_half_of_the_images(marked):
    images = marked[:1].expand(200, -1, -1, -1)
    found = data.augment(images, draws(len(images)), crop=1, degrees=0)
    same = (found - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (found - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert bool((same ^ mirrored).all())
    assert 70 <= int(mirrored.sum()) <= 130


def test_mirroring_is_left_to_right(marked):
    assert torch.allclose(augmented(marked, 1, 0, 0, 0, 0.0, 0, 0), marked.flip(3), atol=1e-4)
    assert torch.allclose(augmented(marked, 1, 0, 0, 0, 0.9, 0, 0), marked, atol=1e-4)


@pytest.mark.parametrize(("draw", "turns"), [(0.0, -1), (0.5, 0), (1.0, 1)])
def test_the_rotation_goes_to_the_degrees_on_both_sides(marked, draw, turns):
    assert torch.allclose(augmented(marked, 1, 90, 0, draw, 0.9, 0, 0), marked.rot90(turns, (2, 3)), atol=1e-4)


def test_a_mirrored_rotation_is_the_mirror_image_rotated(marked):
    found = augmented(marked, 1, 90, 0, 1.0, 0.0, 0, 0)
    assert torch.allclose(found, marked.rot90(1, (2, 3)).flip(3), atol=1e-4)


def test_a_small_rotation_moves_a_mark_along_its_circle():
    image = torch.zeros(1, 3, 65, 65)
    image[:, :, 32, 52] = 1  # 20 to the right of the centre
    found = augmented(image, 1, 30, 0, 1.0, 0.9, 0, 0)[0, 0]
    weight = found / found.sum()
    row, column = (weight.sum(1) * torch.arange(65)).sum() - 32, (weight.sum(0) * torch.arange(65)).sum() - 32
    assert column.item() == pytest.approx(20 * math.cos(math.radians(30)), abs=0.2)
    assert abs(row.item()) == pytest.approx(20 * math.sin(math.radians(30)), abs=0.2)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_the_smallest_crop_reaches_each_corner(marked, right, down):
    found = augmented(marked, 0.5, 0, 0, 0, 0.9, right, down)
    corner = marked[:, :, 16 * down : 16 * down + 16, 16 * right : 16 * right + 16]
    enlarged = torch.nn.functional.interpolate(corner, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(found[:, :, 1:-1, 1:-1], enlarged[:, :, 1:-1, 1:-1], atol=1e-4)  # the border sees its neighbours


def test_the_largest_crop_is_the_image_wherever_it_is_placed(marked):
    assert torch.allclose(augmented(marked, 0.5, 0, 1.0, 0, 0.9, 0.2, 0.7), marked, atol=1e-4)


def test_every_pixel_stays_in_the_range_of_its_image(marked):
    images = (0.3 + 0.4 * marked[:1]).expand(50, -1, -1, -1)
    found = data.augment(images, draws(len(images)), crop=0.6, degrees=45)
    assert found.shape == images.shape
    assert images.min() - 1e-5 <= found.min() and found.max() <= images.max() + 1e-5  # nothing is filled with black
    assert len({image.sum().item() for image in found}) == 50  # each image is drawn for itself


# ---- load


def folder_of(root, *names):
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name)
    return root


def args_for(tmp_path, folder, smoke=False):
    return argparse.Namespace(
        data=folder, device="cpu", smoke=smoke, checkpoints=tmp_path / "checkpoints", results=tmp_path / "results"
    )


def test_load_splits_a_folder_and_describes_it(tmp_path):
    names = [f"{kind}/{kind}.{n}.png" for kind in ("cat", "dog") for n in range(10)]
    found = data.load(args_for(tmp_path, folder_of(tmp_path / "Pets", *names)))
    assert (found.study, found.classes, found.broken) == ("pets", ("cat", "dog"), 0)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [14, 2, 4]
    facts = dict(study="pets", classes=["cat", "dog"], sha256=found.digest, broken=0, train=14, validation=2, test=4)
    assert found.describe() == facts


def test_a_smoke_run_takes_a_few_images_of_each_part_into_a_study_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SMOKE_COUNTS", {"train": 6, "val": 2, "test": 2})
    names = [f"{part}/{kind}/{n}.png" for part in ("train", "val", "test") for kind in ("cat", "dog") for n in range(4)]
    found = data.load(args_for(tmp_path, folder_of(tmp_path / "pets", *names), smoke=True))
    assert found.study == "pets_smoke"
    parts = {"train": found.train, "val": found.validation, "test": found.test}
    assert {name: np.bincount(part.y).tolist() for name, part in parts.items()} == {
        "train": [3, 3],
        "val": [1, 1],
        "test": [1, 1],
    }
    assert all(part.names[i].startswith(name) for name, part in parts.items() for i in part.index)


def test_a_part_without_one_of_the_classes_is_refused(tmp_path):
    names = [*(f"dog/dog.{n}.png" for n in range(10)), "cat/cat.1.png"]  # the only cat goes to the test part
    with pytest.raises(UserError, match="the train part has 7 usable images and not both classes"):
        data.load(args_for(tmp_path, folder_of(tmp_path / "pets", *names)))


@pytest.mark.parametrize(("installed", "reason"), [(False, "pip install kagglehub"), (True, "no route to host")])
def test_a_download_that_cannot_be_had_says_why_and_what_to_do(monkeypatch, installed, reason):
    def fail(_dataset):
        raise ConnectionError("no route to host\nand many more lines")

    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=fail) if installed else None)
    with pytest.raises(UserError, match=reason) as caught:
        data.download()
    assert "\n" not in str(caught.value)
