"""Batches, epochs and calibration images of a split; the data section of a record."""

import pickle

import numpy as np
import pytest
import torch
from helpers import bright_and_dark, numbered_split, split_of

from utils.data.augmentation import MEAN, STD, normalize_
from utils.data.dataset import Split


def numbers(images):
    """Return the numbers of the images in a normalised batch of a `numbered_split`."""
    red = images[:, 0, 0, 0] * STD[0] + MEAN[0]
    return [round(value) for value in (255 * red).tolist()]


def test_batch_is_channels_last_in_zero_to_one(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    batch = split_of(tmp_path, pixels, [0, 1] * 3, index=[1, 3, 5]).batch(np.array([2, 0]))
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 5, 4)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(
        batch.numpy(), pixels[[5, 1]].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    )


def test_batch_is_a_copy(tmp_path):
    split = numbered_split(tmp_path, [0, 1])
    split.batch(np.array([0, 1])).zero_()
    assert split.images[1].max() == 1


def test_batches_come_in_order_with_their_labels(tmp_path):
    labels = np.arange(20) % 3 % 2
    split = numbered_split(tmp_path, labels, index=range(1, 20, 2))
    batches = list(split.batches(4))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert [number for x, _ in batches for number in numbers(x)] == list(range(1, 20, 2))
    assert torch.cat([y for _, y in batches]).tolist() == labels[1::2].tolist() == split.y.tolist()
    assert batches[0][1].dtype == torch.int64


def epoch(split, seed, batch_size=8, **more):
    """Return the batches of one epoch."""
    return list(split.shuffled(batch_size, seed, **more))


def test_epoch_shows_every_image_at_most_once_in_full_batches(tmp_path):
    labels = np.arange(45) % 2
    split = numbered_split(tmp_path, labels, index=range(3, 45))
    batches = epoch(split, 1)
    shown = [number for x, _ in batches for number in numbers(x)]
    assert [len(x) for x, _ in batches] == [8] * 5
    assert len(set(shown)) == 40 and set(shown) <= set(range(3, 45))
    assert shown != sorted(shown)
    assert torch.cat([y for _, y in batches]).tolist() == labels[shown].tolist()


def test_seeds_differ_in_order_and_in_images_left_out(tmp_path):
    split = numbered_split(tmp_path, np.arange(45) % 2)
    orders = [
        [number for x, _ in epoch(split, seed) for number in numbers(x)] for seed in (1, 2, 1)
    ]
    assert orders[0] == orders[2] != orders[1]
    assert set(orders[0]) != set(orders[1])


def test_epoch_of_fewer_images_than_a_batch_is_one_batch(tmp_path):
    [(x, _)] = epoch(numbered_split(tmp_path, [0, 1, 0]), 0)
    assert sorted(numbers(x)) == [0, 1, 2]


def test_epoch_is_augmented_before_it_is_normalised_and_repeats_bit_for_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    split = split_of(tmp_path, pixels, [0, 1] * 8)
    first, again, plain = (
        torch.cat([x for x, _ in epoch(split, 3, augmentation=how)])
        for how in (dict(crop=0.7, degrees=15), dict(crop=0.7, degrees=15), None)
    )
    assert torch.equal(first, again)
    assert (first - plain).abs().mean() > 0.1
    lowest, highest = (normalize_(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    assert bool((first >= lowest - 1e-4).all() and (first <= highest + 1e-4).all())


# ---- other processes, samples, calibration


def test_pickled_as_a_file_name(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    split = split_of(tmp_path, pixels, np.arange(100) % 2, index=[5, 3, 99])
    packed = pickle.dumps(split)
    assert len(packed) < 10_000 < pixels.nbytes
    reopened = pickle.loads(packed)
    assert (reopened.names, reopened.y.tolist(), reopened.images.filename) == (
        split.names,
        [1, 1, 1],
        split.images.filename,
    )
    assert torch.equal(reopened.batch(np.arange(3)), split.batch(np.arange(3)))
    with pytest.raises(ValueError, match="read-only"):
        reopened.images[0] = 0


def test_calibration_images_are_a_fixed_sample_in_equal_parts(tmp_path):
    labels = np.array([0] * 70 + [1] * 30)
    train = numbered_split(tmp_path, labels, index=[i for i in range(100) if i % 5])
    chosen = train.sample(20)
    assert set(chosen.index) <= set(train.index) and len(set(chosen.index)) == 20
    assert np.bincount(chosen.y).tolist() == [10, 10]
    images = train.calibration(20)
    assert numbers(images) == chosen.index.tolist()
    assert torch.equal(images, normalize_(train.batch(np.searchsorted(train.index, chosen.index))))
    assert torch.equal(images, train.calibration(20))


def test_sample_is_chosen_by_name_not_by_position(tmp_path):
    split = numbered_split(tmp_path / "a", np.arange(40) % 2)
    order = np.random.default_rng(0).permutation(40)
    names = tuple(f"elsewhere/{split.names[i]}" for i in order)
    moved = Split(split.images[order], split.labels[order], names, np.arange(40))
    chosen = {names[i].rsplit("/")[-1] for i in moved.sample(10).index}
    assert chosen == {split.names[i] for i in split.sample(10).index}
    assert chosen != {split.names[i] for i in split.sample(10, seed=1).index}


def test_sample_fills_up_with_the_larger_class_up_to_the_whole_split(tmp_path):
    split = numbered_split(tmp_path, [0] * 3 + [1] * 20)
    assert np.bincount(split.sample(10).y).tolist() == [3, 7]
    assert split.sample(100).index.tolist() == list(range(23))
    assert abs(np.diff(np.bincount(split.sample(5).y)).item()) == 1


def test_all_ranks_together_see_the_batches_of_one_process(tmp_path):
    split = numbered_split(tmp_path, np.arange(40) % 2)
    augmentation = dict(crop=0.7, degrees=15)
    shards = [epoch(split, 3, augmentation=augmentation, part=(rank, 2)) for rank in range(2)]
    for (images, labels), *parts in zip(
        epoch(split, 3, augmentation=augmentation), *shards, strict=True
    ):
        for rank, (part_images, part_labels) in enumerate(parts):
            assert torch.equal(part_images, images[rank::2])
            assert torch.equal(part_labels, labels[rank::2])
    assert [split.part(rank, 3).index.tolist() for rank in range(3)] == [
        list(range(rank, 40, 3)) for rank in range(3)
    ]


def test_description_of_data(tmp_path):
    data = bright_and_dark(tmp_path)
    assert data.describe() == dict(
        study="tiny",
        negative_class="dark",
        positive_class="light",
        sha256="0" * 64,
        broken=0,
        layout=None,
        near_duplicates=0,
        near_duplicate_pairs=[],
        train=24,
        validation=12,
        test=12,
    )
