"""A cache is complete or absent, and keyed by everything that decides its pixels."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import PIL
import PIL.features
import pytest
from filelock import FileLock
from PIL import Image

from tests.data.image_files import encoded, noise
from utils import checksums, environment
from utils.data import cache, decoding, layouts, synthetic
from utils.errors import UserError
from utils.paths import ROOT

Usage = namedtuple("Usage", "total used free")
JPEG = encoded(noise(3, 200, 200))


@pytest.fixture
def pets(tmp_path):
    """A data set of 10 images whose files are old enough for their time stamps to be trusted."""
    root = tmp_path / "pets"
    for kind in ("cat", "dog"):
        (root / kind).mkdir(parents=True)
        for number in range(5):
            file = root / kind / f"{number}.jpg"
            file.write_bytes(encoded(noise(number if kind == "cat" else number + 10)))
            os.utime(file, (1_600_000_000, 1_600_000_000))
    return root


def opened(root, directory):
    """Return the cache of the data set in `root`."""
    return cache.identify_folder(layouts.find(root), directory).open()


def home_of(result):
    """Return the folder of a cache."""
    return Path(result.images.filename).parent


def no_decoding(monkeypatch):
    """Let every attempt to decode an image fail."""

    def decode(source):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoding, "decode", decode)


def check_pixels(result, root):
    """Assert that every image of `result` equals its decoded file, bit for bit."""
    assert len(result.names) > 0
    assert result.images.shape == (len(result.names), 224, 224, 3)
    for image, name in zip(result.images, result.names, strict=True):
        assert np.array_equal(image, decoding.decode(root / name))


# ---- files that are too large


def test_images_and_files_that_are_too_large_are_broken(pets, tmp_path):
    """A header of a few bytes claims 13,300 x 13,300 pixels; a sparse file is 512 MiB long."""
    Image.new("1", (13_300, 13_300)).save(pets / "cat" / "large.png")
    with (pets / "cat" / "long.jpg").open("wb") as file:
        file.truncate(cache.LONGEST + 1)
    result = opened(pets, tmp_path / "cache")
    assert dict(result.broken)["cat/large.png"] == "13300 x 13300 pixels, more than 120 million"
    assert dict(result.broken)["cat/long.jpg"] == "536870913 bytes, more than 512 MiB"


def test_decompression_bombs_are_broken_and_nothing_warns(pets, tmp_path, monkeypatch, capfd):
    # Pillow warns above this, and raises an exception above twice this.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (pets / "cat" / "9.jpg").write_bytes(encoded(noise(1, 60, 50)))
    (pets / "dog" / "9.jpg").write_bytes(
        encoded(noise(1), exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    )
    with pytest.warns(Image.DecompressionBombWarning):
        decoding.decode(pets / "cat" / "0.jpg")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = opened(pets, tmp_path / "cache")
    assert caught == []
    assert capfd.readouterr().err == ""
    [(name, reason)] = result.broken
    assert name == "cat/9.jpg"
    assert "decompression bomb" in reason
    assert "dog/9.jpg" in result.names


# ---- folders


def test_round_trip(pets, tmp_path, monkeypatch, capsys):
    """A cache of good and broken files, built and opened again."""
    monkeypatch.setattr(cache, "BLOCK", 3)
    (pets / "cat" / "1.jpg").write_bytes(b"")
    (pets / "cat" / "2a.jpg").write_bytes(JPEG[:3000])
    (pets / "dog" / "notes.txt").touch()
    folder = layouts.find(pets)
    result = cache.identify_folder(folder, tmp_path / "cache").open()
    good = [image for image in folder.images if image.name not in ("cat/1.jpg", "cat/2a.jpg")]
    assert result.names == tuple(image.name for image in good)
    assert result.labels.dtype == np.int64
    assert result.labels.tolist() == [image.label for image in good] == [0] * 4 + [1] * 5
    assert result.splits == (None,) * 9
    assert result.hashes == tuple(
        hashlib.sha256(image.path.read_bytes()).hexdigest() for image in good
    )
    assert isinstance(result.images, np.memmap)
    assert not result.images.flags.writeable
    check_pixels(result, pets)
    assert [name for name, _ in result.broken] == ["cat/1.jpg", "cat/2a.jpg"]
    line = cache.summary(folder, result)
    assert line.startswith(
        "9 images (cat 4, dog 5), class folders, 2 broken and skipped: cat/1.jpg (empty file), "
        "cat/2a.jpg ("
    )
    assert line.endswith("; 1 other file ignored")
    stored = np.load(result.images.filename)
    assert np.array_equal(stored, result.images)

    no_decoding(monkeypatch)
    again = cache.identify_folder(folder, tmp_path / "cache").open()
    assert cache.summary(folder, again) == line
    assert capsys.readouterr().out == ""
    assert np.array_equal(again.images, result.images)
    for field in ("names", "splits", "hashes", "broken", "digest"):
        assert getattr(again, field) == getattr(result, field)
    assert np.array_equal(again.labels, result.labels)


def test_header_has_a_fixed_length():
    assert len({len(cache._header(count)) for count in (0, 9, 10, 123_456)}) == 1


def test_splits_are_stored(tmp_path):
    root = tmp_path / "data"
    for number, folder in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        (root / folder).mkdir(parents=True)
        (root / folder / "1.jpg").write_bytes(encoded(noise(number)))
    assert opened(root, tmp_path / "cache").splits == ("test", "test", "train", "train")


def test_digest_is_known_before_anything_is_decoded(pets, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        no_decoding(patch)
        pending = cache.identify_folder(layouts.find(pets), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    result = pending.open()
    assert result.digest == pending.digest
    check_pixels(result, pets)
    assert cache.identify_folder(layouts.find(pets), tmp_path / "cache").digest == pending.digest


def test_classes_not_chosen_are_not_decoded(pets, tmp_path):
    (pets / "fox").mkdir()
    (pets / "fox" / "1.jpg").write_bytes(b"")
    folder = layouts.find(pets, ("cat", "dog"))
    result = cache.identify_folder(folder, tmp_path / "cache").open()
    assert (len(result.names), result.broken) == (10, ())
    assert (
        cache.summary(folder, result)
        == "10 images (cat 5, dog 5), class folders; 1 other file ignored"
    )
    (pets / "fox" / "2.jpg").write_bytes(encoded(noise(99)))
    foxes = cache.identify_folder(layouts.find(pets, ("fox", "dog")), tmp_path / "cache").open()
    assert len(foxes.names) == 6
    assert foxes.digest != result.digest


def test_many_broken_images_are_counted(pets, tmp_path):
    for number in range(7):
        (pets / "cat" / f"x{number}.jpg").write_bytes(b"text")
    result = opened(pets, tmp_path / "cache")
    assert len(result.broken) == 7
    line = cache.summary(layouts.find(pets), result)
    assert line.count("(not an image)") == 5
    assert line.endswith(" and 2 more")


def test_class_without_a_readable_image(pets, tmp_path):
    for file in (pets / "dog").iterdir():
        file.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"none of the dog images can be read\.\ndog/0\.jpg: empty file"
        ):
            opened(pets, tmp_path / "cache")
    for file in (pets / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of the cat images can be read"):
        opened(pets, tmp_path / "cache")


def test_second_opening_reads_no_file(pets, tmp_path, monkeypatch):
    first = opened(pets, tmp_path / "cache")
    monkeypatch.setattr(cache, "_hashes", None)
    assert opened(pets, tmp_path / "cache").digest == first.digest


def test_new_time_stamp_decodes_nothing(pets, tmp_path, monkeypatch):
    first = opened(pets, tmp_path / "cache")
    no_decoding(monkeypatch)
    os.utime(pets / "cat" / "0.jpg")
    assert opened(pets, tmp_path / "cache").digest == first.digest


def test_copy_elsewhere_has_the_same_digest(pets, tmp_path, monkeypatch):
    first = opened(pets, tmp_path / "cache")
    shutil.copytree(pets, tmp_path / "copy")
    assert opened(tmp_path / "copy", tmp_path / "cache 2").digest == first.digest
    no_decoding(monkeypatch)
    check = opened(tmp_path / "copy", tmp_path / "cache")
    assert check.digest == first.digest


def test_changed_byte_changes_the_digest(pets, tmp_path):
    first = opened(pets, tmp_path / "cache")
    file = pets / "dog" / "4.jpg"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    second = opened(pets, tmp_path / "cache")
    assert second.digest != first.digest
    check_pixels(second, pets)


def test_change_without_a_new_time_stamp_is_noticed(pets, tmp_path):
    file = pets / "dog" / "4.jpg"
    os.utime(file)
    stamp = file.stat().st_mtime_ns
    first = opened(pets, tmp_path / "cache")
    data = file.read_bytes()
    file.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    os.utime(file, ns=(stamp, stamp))
    assert opened(pets, tmp_path / "cache").digest != first.digest


def test_new_name_changes_the_digest(pets, tmp_path):
    first = opened(pets, tmp_path / "cache")
    (pets / "dog" / "4.jpg").rename(pets / "dog" / "5.jpg")
    assert opened(pets, tmp_path / "cache").digest != first.digest


def test_file_that_vanishes_or_changes_meanwhile(pets, tmp_path, monkeypatch):
    folder = layouts.find(pets)
    monkeypatch.setattr(cache, "_hashes", lambda folder: ["0" * 64] * len(folder.images))
    with pytest.raises(UserError, match="changed while the images were being read"):
        cache.identify_folder(folder, tmp_path / "cache").open()
    assert not list((tmp_path / "cache").glob("*.building"))
    (pets / "cat" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*3\.jpg: No such file"):
        cache.identify_folder(folder, tmp_path / "cache").open()


def test_name_that_is_not_utf8(pets, tmp_path):
    try:
        (pets / "cat" / os.fsdecode(b"\xff.jpg")).touch()
    except OSError:
        pytest.skip("this file system refuses invalid UTF-8")
    for _ in range(2):
        result = opened(pets, tmp_path / "cache")
        assert result.broken == ((os.fsdecode(b"cat/\xff.jpg"), "empty file"),)
    assert "cat/?.jpg (empty file)" in cache.summary(layouts.find(pets), result)


# ---- damage and accidents


def shorten(home):
    os.truncate(home / "images.npy", 224 * 224 * 3)


def lengthen(home):
    with (home / "images.npy").open("ab") as file:
        file.write(b"0")


def change_header(home):
    with (home / "images.npy").open("r+b") as file:
        file.write(b"garbage")


def change_pixel(home):
    with (home / "images.npy").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        (value,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))


def change_index(old, new):
    def change(home):
        content = (home / "index").read_bytes()
        assert old in content
        (home / "index").write_bytes(content.replace(old, new, 1))

    return change


def another_index(home):
    checksums.write(
        home / "index", json.dumps({"digest": "0" * 64, "images": [], "broken": []}).encode()
    )


DAMAGE = {
    "images shortened": shorten,
    "images lengthened": lengthen,
    "header changed": change_header,
    "images gone": lambda home: (home / "images.npy").unlink(),
    "a pixel changed": change_pixel,
    "index shortened": lambda home: os.truncate(home / "index", 100),
    "index no JSON": lambda home: (home / "index").write_bytes(b"\xff\xfe"),
    "index of other images": another_index,
    "index gone": lambda home: (home / "index").unlink(),
    "a label changed": change_index(b", 0, ", b", 1, "),
    "shortcuts no JSON": lambda home: [
        file.write_text("{") for file in (home.parent / "known").iterdir()
    ],
    "cache gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_built_again(pets, tmp_path, damage):
    first = opened(pets, tmp_path / "cache")
    home = home_of(first)
    whole = {file.name: file.read_bytes() for file in home.iterdir()}
    DAMAGE[damage](home)
    second = opened(pets, tmp_path / "cache")
    assert second.digest == first.digest
    assert {file.name: file.read_bytes() for file in home.iterdir()} == whole
    check_pixels(second, pets)


def test_full_disk_is_reported_beforehand(pets, tmp_path, monkeypatch):
    needed = 10 * 224 * 224 * 3
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Usage(needed, 1, needed - 1))
    with pytest.raises(UserError) as caught:
        opened(pets, tmp_path / "cache")
    assert str(needed) in str(caught.value)
    assert str(tmp_path / "cache") in str(caught.value)


def test_disk_that_fills_up_meanwhile(pets, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", fsync)
        with pytest.raises(
            UserError, match=f"{10 * 224 * 224 * 3} bytes, in .*cache: No space left on device"
        ):
            opened(pets, tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    check_pixels(opened(pets, tmp_path / "cache"), pets)


def test_directory_that_cannot_be_made(pets, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write the image cache"):
        opened(pets, tmp_path / "cache")


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from utils import cli
from utils.data import cache, decoding, layouts

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
root, directory, log = map(Path, sys.argv[1:4])
accident = sys.argv[4]
plain = decoding.decode
cache.BLOCK = 4

def decode(data):
    with log.open("a") as file:
        file.write("x")
    if accident == "wait":
        while not log.with_name("go").exists():
            time.sleep(0.01)
    elif log.stat().st_size >= 6 and not log.with_name("struck").exists():
        log.with_name("struck").touch()
        os.kill(os.getpid(), int(accident))
        time.sleep(0.2)
    return plain(data)

decoding.decode = decode
with cli.reporting("program"):
    result = cache.identify_folder(layouts.find(root), directory).open()
    print(result.digest, len(result.names))
"""


def program(pets, tmp_path, accident):
    """Start a process that opens a cache and meets an `accident`: a signal's number or "wait"."""
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        pets,
        tmp_path / "cache",
        tmp_path / "log",
        str(accident),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_two_processes_at_once(pets, tmp_path):
    log = tmp_path / "log"
    log.touch()
    first = program(pets, tmp_path, "wait")
    try:
        while not log.stat().st_size and first.poll() is None:  # until it builds
            time.sleep(0.01)
        second = program(pets, tmp_path, "wait")
        waiting = second.stdout.readline()
    finally:
        (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=20) for process in (first, second)]
    assert "waiting for another process" in waiting
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    result = opened(pets, tmp_path / "cache")
    assert [out.splitlines()[-1] for out, _ in outputs] == [f"{result.digest} 10"] * 2
    assert log.stat().st_size == 10  # each image is decoded once
    check_pixels(result, pets)


def test_killed_while_building(pets, tmp_path):
    process = program(pets, tmp_path, 9)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -9, errors
    directory = tmp_path / "cache"
    [left] = directory.glob("*.building")
    # One from the build of another data set, and one that is being built now.
    shutil.copytree(left, directory / "0123456789abcdef.building")
    shutil.copytree(left, directory / "fedcba9876543210.building")
    with FileLock(directory / "fedcba9876543210.lock"):
        result = opened(pets, directory)
    check_pixels(result, pets)
    assert len(result.names) == 10
    assert [file.name for file in directory.glob("*.building")] == ["fedcba9876543210.building"]


def test_interrupted_while_building(pets, tmp_path):
    process = program(pets, tmp_path, 2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "error: interrupted; run the same command again to continue\n"
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    assert (tmp_path / "log").stat().st_size < 10
    check_pixels(opened(pets, tmp_path / "cache"), pets)


# ---- synthetic images


def draw(seed, index):
    generator = np.random.default_rng((seed, index))
    return generator.integers(0, 256, (224, 224, 3), np.uint8), index % 2


COUNTS = {"train": 4, "val": 1, "test": 2}


@pytest.fixture
def noisy_drawings(monkeypatch):
    """Draw noise instead of animals, which is quicker."""
    monkeypatch.setattr(synthetic, "draw", draw)


def no_drawing(monkeypatch):
    """Let every attempt to draw an image fail."""
    monkeypatch.setattr(synthetic, "draw", None)


def drawn(directory, seed=5, counts=COUNTS):
    """Return the cache of synthetic images in `directory`."""
    return cache.identify_synthetic(seed, counts, directory).open()


def test_synthetic_images(tmp_path, monkeypatch, capsys, noisy_drawings):
    monkeypatch.setattr(cache, "BLOCK", 3)
    first = drawn(tmp_path)
    assert first.splits == ("train",) * 4 + ("val",) + ("test",) * 2
    assert first.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert len(set(first.names)) == len(set(first.hashes)) == 7
    assert first.broken == ()
    for index, image in enumerate(first.images):
        assert np.array_equal(image, draw(5, index)[0])
        assert first.hashes[index] == hashlib.sha256(image.tobytes()).hexdigest()
    assert capsys.readouterr().out == ""
    assert cache.synthetic_summary(COUNTS) == "7 drawn images (train 4, val 1, test 2)"
    no_drawing(monkeypatch)
    second = drawn(tmp_path)
    assert second.digest == first.digest
    assert np.array_equal(second.images, first.images)


@pytest.mark.parametrize(
    ("seed", "counts", "version"),
    [(6, COUNTS, 1), (5, {"train": 4, "val": 2, "test": 1}, 1), (5, COUNTS, 2)],
)
def test_other_drawings_have_other_digests(
    tmp_path, monkeypatch, noisy_drawings, seed, counts, version
):
    first = drawn(tmp_path)
    monkeypatch.setattr(synthetic, "VERSION", version)
    assert drawn(tmp_path, seed, counts).digest != first.digest


def test_digest_of_drawings_is_known_before_anything_is_drawn(
    tmp_path, monkeypatch, noisy_drawings
):
    with monkeypatch.context() as patch:
        no_drawing(patch)
        pending = cache.identify_synthetic(5, COUNTS, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert pending.open().digest == pending.digest


def test_error_in_drawing_leaves_nothing(tmp_path, monkeypatch):
    def fails(seed, index):
        raise ZeroDivisionError

    monkeypatch.setattr(synthetic, "draw", fails)
    with pytest.raises(ZeroDivisionError):
        drawn(tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


# ---- the key of a cache


def changed_code(monkeypatch, module):
    """Let the code of `module` have another digest, as after an edit."""
    plain = environment.code_of

    def code_of(*names):
        changed = dict.fromkeys(plain(module), "0" * 64) if module in names else {}
        return plain(*names) | changed

    monkeypatch.setattr(environment, "code_of", code_of)


def changed_codec(monkeypatch, codec):
    """Let Pillow have another version of the library `codec`."""
    plain = PIL.features.version
    monkeypatch.setattr(
        PIL.features, "version", lambda name: "0.1" if name == codec else plain(name)
    )


def changed_release(monkeypatch):
    """Let Pillow be another release of the same major version."""
    monkeypatch.setattr(PIL, "__version__", f"{PIL.__version__.partition('.')[0]}.999.0")


def changed_isa(monkeypatch):
    """Let the processor have another instruction set."""
    monkeypatch.setattr(environment, "cpu", lambda: ("another", ("other",)))


OF_FILES = {
    "code": lambda patch: changed_code(patch, "utils.data.decoding"),
    "Pillow": changed_release,
    "libjpeg": lambda patch: changed_codec(patch, "jpg"),
    "libjpeg-turbo": lambda patch: changed_codec(patch, "libjpeg_turbo"),
    "libwebp": lambda patch: changed_codec(patch, "webp"),
    "libtiff": lambda patch: changed_codec(patch, "libtiff"),
}
OF_DRAWINGS = {
    "code": lambda patch: changed_code(patch, "utils.data.synthetic"),
    "Pillow": changed_release,
    "NumPy": lambda patch: patch.setattr(np, "__version__", "0.1"),
    "instruction set": changed_isa,
}


@pytest.mark.parametrize("change", OF_FILES)
def test_files_are_decoded_again_after_a_change_but_stay_the_same_data(
    pets, tmp_path, monkeypatch, change
):
    first = opened(pets, tmp_path / "cache")
    known = set((tmp_path / "cache" / "known").iterdir())
    OF_FILES[change](monkeypatch)
    with monkeypatch.context() as patch:
        no_decoding(patch)
        with pytest.raises(AssertionError, match="decoded again"):
            opened(pets, tmp_path / "cache")
    second = opened(pets, tmp_path / "cache")
    assert second.digest == first.digest
    assert home_of(second) != home_of(first)
    assert len(set((tmp_path / "cache" / "known").iterdir()) - known) == 1
    no_decoding(monkeypatch)
    assert home_of(opened(pets, tmp_path / "cache")) == home_of(second)


@pytest.mark.parametrize("change", OF_DRAWINGS)
def test_images_are_drawn_again_after_a_change_but_stay_the_same_data(
    tmp_path, monkeypatch, noisy_drawings, change
):
    first = drawn(tmp_path)
    OF_DRAWINGS[change](monkeypatch)
    second = drawn(tmp_path)
    assert second.digest == first.digest
    assert home_of(second) != home_of(first)
    no_drawing(monkeypatch)
    assert home_of(drawn(tmp_path)) == home_of(second)


def test_code_that_decides_nothing_does_not_count(pets, tmp_path, monkeypatch):
    first = opened(pets, tmp_path)
    changed_code(monkeypatch, "utils.data.synthetic")
    changed_code(monkeypatch, "utils.data.augmentation")
    no_decoding(monkeypatch)
    assert home_of(opened(pets, tmp_path)) == home_of(first)


@pytest.mark.parametrize("module", ["decoding", "synthetic"])
def test_the_code_that_makes_the_pixels_counts(module):
    pixels = {"decoding": cache._decoder, "synthetic": cache._painter}[module]()
    assert f"utils/data/{module}.py" in pixels["code"]


def test_the_identity_of_the_data_does_not_change(tmp_path, monkeypatch):
    """Committed records name their data by this digest, so new code must give the same one."""
    monkeypatch.setattr(PIL, "__version__", "12.0.0")
    counts = {"train": 1700, "val": 300, "test": 1000}
    digest = "d2268015afef6d1af387f8f11e1cf98a7d83993a4c62ac5518263305ea791543"
    assert cache.identify_synthetic(0, counts, tmp_path).digest == digest
    for kind, number in itertools.product(("cat", "dog"), range(2)):
        file = tmp_path / "pets" / kind / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"{kind}{number}".encode())
    digest = "18b2d7c7eaec9e38c85dcb46dde3b09ed2095b19f5c38a2c2b4e01266b4134b9"
    assert cache.identify_folder(layouts.find(tmp_path / "pets"), tmp_path).digest == digest
