"""What each kind of file decodes to; a cache is complete or absent, whatever happens to it."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils import checksums
from utils.data import cache, layouts
from utils.errors import UserError
from utils.paths import ROOT

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
Usage = namedtuple("Usage", "total used free")


def noise(seed, width=40, height=30):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def at(pixels, x, y):
    """Return the pixel at the fractions x of the width and y of the height."""
    return tuple(int(value) for value in pixels[round(y * 223), round(x * 223)])


def near(pixel, colour, tolerance=6):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


@pytest.fixture
def pets(tmp_path):
    """A data set of 10 images; its files are old enough to rely on their time stamps."""
    root = tmp_path / "pets"
    for kind in ("cat", "dog"):
        (root / kind).mkdir(parents=True)
        for number in range(5):
            file = root / kind / f"{number}.jpg"
            file.write_bytes(encoded(noise(number + 10 * (kind == "dog"))))
            os.utime(file, (1_600_000_000, 1_600_000_000))
    return root


def opened(root, directory):
    """Return the cache of the data set in `root`."""
    return cache.open_folder(layouts.find(root), directory)


def no_decoding(monkeypatch):
    """Let every attempt to decode an image fail."""

    def decode(source):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "decode", decode)


def check_pixels(result, root):
    """Assert that every image of `result` equals its decoded file, bit for bit."""
    assert len(result.names) > 0
    assert result.images.shape == (len(result.names), 224, 224, 3)
    for image, name in zip(result.images, result.names, strict=True):
        assert np.array_equal(image, cache.decode(root / name))


# ---- decode


@pytest.mark.parametrize("size", [(40, 30), (500, 375), (224, 224), (1, 1), (300, 100)])
def test_rgb_jpeg_equals_pillows_bilinear_resize(tmp_path, size):
    file = tmp_path / "1.jpg"
    file.write_bytes(encoded(noise(1, *size)))
    with Image.open(file) as image:
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
    pixels = cache.decode(file)
    assert (pixels.dtype, pixels.shape, pixels.flags.writeable) == (np.uint8, (224, 224, 3), True)
    assert np.array_equal(pixels, expected)
    assert np.array_equal(cache.decode(file.read_bytes()), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_suffix_does_not_matter(tmp_path, kind):
    (tmp_path / "1.jpg").write_bytes(encoded(Image.new("RGB", (20, 20), RED), kind))
    assert near(at(cache.decode(tmp_path / "1.jpg"), 0.5, 0.5), RED)


# Corners (x, y) of the upright image at which EXIF puts the ends of the first stored row.
CORNERS = {
    1: ((0, 0), (1, 0)),
    2: ((1, 0), (0, 0)),
    3: ((1, 1), (0, 1)),
    4: ((0, 1), (1, 1)),
    5: ((0, 0), (0, 1)),
    6: ((1, 0), (1, 1)),
    7: ((1, 1), (1, 0)),
    8: ((0, 1), (0, 0)),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation(kind, orientation):
    stored = Image.new("RGB", (64, 48), BLACK)
    stored.paste(RED, (0, 0, 32, 24))
    stored.paste(GREEN, (32, 0, 64, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = cache.decode(encoded(stored, kind, exif=exif))
    corners = {(x, y): at(pixels, 0.1 + 0.8 * x, 0.1 + 0.8 * y) for x in (0, 1) for y in (0, 1)}
    red, green = CORNERS[orientation]
    assert near(corners.pop(red), RED)
    assert near(corners.pop(green), GREEN)
    assert all(near(pixel, BLACK) for pixel in corners.values())


def test_damaged_exif_data_is_ignored():
    image = noise(2)
    damaged = encoded(image, exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01\x03\x00")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        pixels = cache.decode(damaged)
    assert np.array_equal(pixels, cache.decode(encoded(image)))
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n4\nno hexadecimal digits")
    assert np.array_equal(
        cache.decode(encoded(image, "PNG", pnginfo=text)), cache.decode(encoded(image, "PNG"))
    )


def halves(mode, left, right):
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def palette(**options):
    image = Image.new("P", (40, 20), 0)
    image.putpalette([*BLUE, *RED])
    image.paste(1, (20, 0, 40, 20))
    return encoded(image, "PNG", **options)


def grey16(left, right):
    return Image.fromarray(np.repeat(np.array([[left] * 20 + [right] * 20], np.uint16), 20, axis=0))


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        pytest.param(encoded(halves("1", 0, 1), "PNG"), BLACK, WHITE, id="1 bit"),
        pytest.param(encoded(halves("L", 40, 200)), (40,) * 3, (200,) * 3, id="grey JPEG"),
        pytest.param(
            encoded(halves("LA", (0, 255), (0, 128)), "PNG"), BLACK, (127,) * 3, id="grey and alpha"
        ),
        pytest.param(
            encoded(halves("L", 0, 90), "PNG", transparency=0),
            WHITE,
            (90,) * 3,
            id="grey, one transparent",
        ),
        pytest.param(encoded(halves("RGBA", (*RED, 255), (*RED, 0)), "PNG"), RED, WHITE, id="RGBA"),
        pytest.param(
            encoded(halves("RGB", RED, BLUE), "PNG", transparency=BLUE),
            RED,
            WHITE,
            id="RGB, one transparent",
        ),
        pytest.param(palette(), BLUE, RED, id="palette"),
        pytest.param(palette(transparency=0), WHITE, RED, id="palette, one transparent"),
        pytest.param(
            palette(transparency=b"\x80\xff"), (127, 127, 255), RED, id="palette with alpha"
        ),
        pytest.param(
            encoded(halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255))), RED, BLACK, id="CMYK JPEG"
        ),
        pytest.param(
            encoded(halves("CMYK", (255, 255, 0, 0), (0, 0, 0, 0)), "TIFF"),
            BLUE,
            WHITE,
            id="CMYK TIFF",
        ),
        pytest.param(encoded(grey16(256, 32896), "PNG"), (1,) * 3, (128,) * 3, id="16 bit PNG"),
        pytest.param(encoded(grey16(0, 65535), "TIFF"), BLACK, WHITE, id="16 bit TIFF"),
    ],
)
def test_modes_become_rgb(data, left, right):
    pixels = cache.decode(data)
    assert pixels.shape == (224, 224, 3)
    tolerance = 0 if data.startswith(b"\x89PNG") else 6
    assert near(at(pixels, 0.2, 0.5), left, tolerance)
    assert near(at(pixels, 0.8, 0.5), right, tolerance)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert at(cache.decode(data), 0.5, 0.5) == RED


JPEG = encoded(noise(3, 200, 200))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404 not found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:20], ""),
        (encoded(noise(3), "PNG")[:900], ""),
        (encoded(Image.fromarray(np.ones((5, 5), np.float32)), "TIFF"), "32-bit grey"),
    ],
)
def test_broken_files(data, reason):
    with pytest.raises(cache.BrokenImage) as caught:
        cache.decode(data)
    assert reason in str(caught.value)
    assert 0 < len(str(caught.value)) <= 100
    assert "0x" not in str(caught.value)  # an object's address would differ between runs


def test_missing_file_is_not_a_broken_image(tmp_path):
    with pytest.raises(FileNotFoundError):
        cache.decode(tmp_path / "1.jpg")


def test_images_and_files_that_are_too_large_are_broken(pets, tmp_path):
    """A header of a few bytes promises 13,300 x 13,300 pixels; a file of holes takes no room on the disk."""
    Image.new("1", (13_300, 13_300)).save(pets / "cat" / "large.png")
    with (pets / "cat" / "long.jpg").open("wb") as file:
        file.truncate(cache.LONGEST + 1)
    result = opened(pets, tmp_path / "cache")
    assert dict(result.broken)["cat/large.png"] == "13300 x 13300 pixels, more than 120 million"
    assert dict(result.broken)["cat/long.jpg"] == "536870913 bytes, more than 512 MiB"


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 50 * 50)
    running, most = [], []

    def rgb(image):
        running.append(1)
        time.sleep(0.02)
        most.append(len(running))
        running.pop()
        return image.convert("RGB")

    monkeypatch.setattr(cache, "_rgb", rgb)
    for side, at_once in ((50, 4), (51, 1)):
        data = encoded(Image.new("RGB", (side, side)))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(cache.decode, [data] * 8))
        assert max(most) == at_once
        most.clear()


def test_decompression_bombs_are_broken_and_nothing_warns(pets, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 1000
    )  # Pillow warns above this and raises above its double
    (pets / "cat" / "9.jpg").write_bytes(encoded(noise(1, 60, 50)))
    (pets / "dog" / "9.jpg").write_bytes(
        encoded(noise(1), exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    )
    with pytest.warns(Image.DecompressionBombWarning):
        cache.decode(pets / "cat" / "0.jpg")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = opened(pets, tmp_path / "cache")
    assert caught == []
    assert capfd.readouterr().err == ""
    [(name, reason)] = result.broken
    assert name == "cat/9.jpg"
    assert "decompression bomb" in reason
    assert "dog/9.jpg" in result.names


# ---- open_folder


def test_round_trip(pets, tmp_path, monkeypatch, capsys):
    """A cache of good and broken files, built and opened again."""
    monkeypatch.setattr(cache, "BLOCK", 3)
    (pets / "cat" / "1.jpg").write_bytes(b"")
    (pets / "cat" / "2a.jpg").write_bytes(JPEG[:3000])
    (pets / "dog" / "notes.txt").touch()
    folder = layouts.find(pets)
    result = cache.open_folder(folder, tmp_path / "cache")
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
        "9 images (cat 4, dog 5), 2 broken and skipped: cat/1.jpg (empty file), cat/2a.jpg ("
    )
    assert line.endswith("; 1 other file ignored")
    stored = np.load(
        tmp_path / "cache" / result.digest[:16] / "images.npy"
    )  # a file like any other
    assert np.array_equal(stored, result.images)

    no_decoding(monkeypatch)
    again = cache.open_folder(folder, tmp_path / "cache")
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
    result = cache.open_folder(folder, tmp_path / "cache")
    assert (len(result.names), result.broken) == (10, ())
    assert cache.summary(folder, result) == "10 images (cat 5, dog 5); 1 other file ignored"
    (pets / "fox" / "2.jpg").write_bytes(encoded(noise(99)))
    foxes = cache.open_folder(layouts.find(pets, ("fox", "dog")), tmp_path / "cache")
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
        cache.open_folder(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.building"))
    (pets / "cat" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*3\.jpg: No such file"):
        cache.open_folder(folder, tmp_path / "cache")


def test_name_of_invalid_utf8(pets, tmp_path):
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
    home = tmp_path / "cache" / first.digest[:16]
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
from utils.data import cache, layouts

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background processes ignore it
root, directory, log, accident = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
plain = cache.decode
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

cache.decode = decode
result = cache.open_folder(layouts.find(root), directory)
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
    shutil.copytree(
        left, directory / "0123456789abcdef.building"
    )  # from the build of another data set
    shutil.copytree(left, directory / "fedcba9876543210.building")  # being built now
    with FileLock(directory / "fedcba9876543210.lock"):
        result = opened(pets, directory)
    check_pixels(result, pets)
    assert len(result.names) == 10
    assert [file.name for file in directory.glob("*.building")] == ["fedcba9876543210.building"]


def test_interrupted_while_building(pets, tmp_path):
    process = program(pets, tmp_path, 2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors == "error: interrupted\n"
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    assert (tmp_path / "log").stat().st_size < 10
    check_pixels(opened(pets, tmp_path / "cache"), pets)


# ---- open_drawn


def draw(seed, index):
    generator = np.random.default_rng((seed, index))
    return generator.integers(0, 256, (224, 224, 3), np.uint8), index % 2


COUNTS = {"train": 4, "val": 1, "test": 2}


def test_drawn_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "BLOCK", 3)
    first = cache.open_drawn(5, COUNTS, tmp_path, draw, version=1)
    assert first.splits == ("train",) * 4 + ("val",) + ("test",) * 2
    assert first.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert len(set(first.names)) == len(set(first.hashes)) == 7
    assert first.broken == ()
    for index, image in enumerate(first.images):
        assert np.array_equal(image, draw(5, index)[0])
        assert first.hashes[index] == hashlib.sha256(image.tobytes()).hexdigest()
    assert capsys.readouterr().out == ""
    assert cache.drawn_summary(COUNTS) == "7 drawn images (train 4, val 1, test 2)"
    second = cache.open_drawn(5, COUNTS, tmp_path, None, version=1)  # draws nothing
    assert second.digest == first.digest
    assert np.array_equal(second.images, first.images)


@pytest.mark.parametrize(
    ("seed", "counts", "version"),
    [(6, COUNTS, 1), (5, {"train": 4, "val": 2, "test": 1}, 1), (5, COUNTS, 2)],
)
def test_other_drawings_have_other_digests(tmp_path, seed, counts, version):
    first = cache.open_drawn(5, COUNTS, tmp_path, draw, version=1)
    assert cache.open_drawn(seed, counts, tmp_path, draw, version=version).digest != first.digest


def test_digest_of_drawings_is_known_before_anything_is_drawn(tmp_path):
    pending = cache.identify_drawn(5, COUNTS, tmp_path / "cache", draw, version=1)
    assert not (tmp_path / "cache").exists()
    assert pending.open().digest == pending.digest


def test_error_in_drawing_leaves_nothing(tmp_path):
    def fails(seed, index):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.open_drawn(5, COUNTS, tmp_path, fails, version=1)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]
