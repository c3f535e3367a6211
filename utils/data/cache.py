"""Images decoded once and kept as one memory-mapped array, named after their content.

A cache is a folder DIGEST/ with images.npy and an index, which has a checksum of each image. It is
built beside its place, under a lock, and renamed into it when complete: whatever is killed in
between, no reader sees half a cache. A cache that was damaged later is built again.
"""

import hashlib
import io
import json
import os
import shutil
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError

from utils import checksums, paths
from utils.data import layouts
from utils.errors import UserError, printable
from utils.progress import Bar, say

SIZE = 224
VERSION = 1  # of the pixels: raise it with any change of them
ROW = SIZE * SIZE * 3  # bytes of one image
BLOCK = 128  # images in memory at a time
THREADS = min(16, os.cpu_count() or 1)
# An image with transparency takes about 20 bytes a pixel while it is decoded. One large image and small ones in 16 threads
# took 4.7 GiB at most.
LARGEST = 120_000_000  # pixels: the largest photographs of telephones have 108 million
LARGE = 8_000_000  # pixels above which images are decoded one at a time
LONGEST = 2**29  # bytes of a file
NAMED = 5  # broken images that the summary names
SETTLED_NS = (
    2_000_000_000  # a file that changed within this time may change again under the same time stamp
)
# Only what the suffixes promise: Pillow would run an interpreter on a PostScript file named .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # what undoes each of its values
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_large = threading.Lock()


class BrokenImage(ValueError):  # noqa: N818 - the image is skipped and listed: no error of the program
    """A file that cannot be decoded; the message is a short reason without the file's name."""


@dataclass(frozen=True, eq=False)
class Cache:
    """The decoded images in the order of their names, and a list of the broken ones.

    `images` is a read-only memory map, uint8 (N, 224, 224, 3) RGB. `labels` is int64 (N,). `names`,
    `splits` and `hashes` have N entries each; a hash is the SHA-256 of the file's bytes, or of the
    pixels of a drawn image. `broken` holds (name, reason). `digest`, 64 hexadecimal digits,
    identifies the content: all bytes of all files, their names, labels and splits.
    """

    images: np.memmap
    labels: np.ndarray
    names: tuple[str, ...]
    splits: tuple[str | None, ...]
    hashes: tuple[str, ...]
    broken: tuple[tuple[str, str], ...]
    digest: str


@dataclass(frozen=True, eq=False)
class Pending:
    """A cache whose content is known but which may have to be built yet.

    `digest` is the digest of the cache. `open()` returns the cache, after building it if it is not
    there; it prints progress and raises UserError, see `identify_folder` and `identify_drawn`.
    """

    digest: str
    open: Callable[[], Cache]


class Entry(NamedTuple):
    """One image in the index; `reason` is None unless the image is broken."""

    name: str
    label: int
    split: str | None
    hash: str
    reason: str | None = None


def decode(source: Path | bytes) -> np.ndarray:
    """Return the image in a file, given as its path or its bytes, as uint8 (224, 224, 3) RGB.

    The image is turned upright by its EXIF data. Of an animation it is the first frame.
    Transparency is laid over white, 16-bit grey scaled to 8 bits. The resize to 224 x 224 ignores
    the aspect ratio and uses Pillow's antialiased bilinear filter, as torchvision's
    `Resize((224, 224))` does on PIL images.

    Raises BrokenImage if the bytes are no complete image, or one of more than LARGEST pixels, and
    OSError if the file cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise BrokenImage("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image, _room(*image.size):
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            rgb = _rgb(image)
            upright = rgb if turn is None else rgb.transpose(turn)
            return np.array(upright.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image") from error
    except Exception as error:  # on damaged files Pillow's readers raise exceptions of any type
        reason = str(error).partition("\n")[0][:100]
        raise BrokenImage(reason or type(error).__name__) from error


@contextmanager
def _room(width: int, height: int) -> Iterator[None]:
    """Wait until there is memory for an image of this size; raise BrokenImage if there never will be."""
    if width * height > LARGEST:
        raise BrokenImage(f"{width} x {height} pixels, more than {LARGEST // 10**6} million")
    with _large if width * height > LARGE else nullcontext():
        yield


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) without it or if the EXIF data is damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB."""
    if image.mode.startswith("I;16"):
        # Pillow's conversion would clip at 255; 65535 / 257 is 255 exactly.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenImage("32-bit grey, whose white is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def identify_folder(folder: layouts.Folder, directory: Path) -> Pending:
    """Return the cache of `folder` in `directory` with its digest, nothing decoded yet.

    The files are read only if a name, size or modification time changed since the last time. They
    are decoded, by `open()`, only if a name or a content changed.

    Raises UserError if a file cannot be read. `open()` raises it if a file changes meanwhile, if
    the cache cannot be written or does not fit on the disk, or if all images of a class in a split
    are broken.
    """
    directory = Path(directory)
    signature, settled = _signature(folder)
    known = directory / "known" / f"{signature}.json"
    cache = _recall(directory, known)
    if cache is not None:
        return Pending(cache.digest, lambda: _checked(folder, cache))
    hashes = _hashes(folder)
    candidates = [
        [i.name, i.split, i.label, digest] for i, digest in zip(folder.images, hashes, strict=True)
    ]
    digest = _sha256(_kind(), folder.classes, candidates)

    def build() -> Cache:
        cache = _open(
            directory, digest, len(hashes), lambda index: _read(folder.images[index], hashes[index])
        )
        if settled:
            with suppress(OSError):  # only a short cut: a prepared cache may be read-only
                paths.write_text(known, json.dumps({"digest": digest}) + "\n")
        return _checked(folder, cache)

    return Pending(digest, build)


def identify_drawn(
    seed: int,
    counts: dict[str, int],
    directory: Path,
    draw: Callable[[int, int], tuple[np.ndarray, int]],
    version: int,
) -> Pending:
    """Return the cache of drawn images in `directory` with its digest, nothing drawn yet.

    `draw(seed, index)` returns one image, uint8 (224, 224, 3), and its label. Several threads call
    it, with consecutive indices through all splits in the order of `counts`, which maps splits to
    numbers of images. `version` is the version of the drawings. The digest depends on `version`,
    `seed` and `counts`.

    `open()` raises UserError if the cache cannot be written or does not fit on the disk.
    """
    splits = [split for split, count in counts.items() for _ in range(count)]
    digest = _sha256(_kind(), "drawn", version, seed, list(counts.items()))

    def make(index: int) -> tuple[np.ndarray, Entry]:
        image, label = draw(seed, index)
        name = f"{splits[index]}/{index:06d}"
        return image, Entry(
            name, int(label), splits[index], hashlib.sha256(image.tobytes()).hexdigest()
        )

    return Pending(digest, lambda: _open(Path(directory), digest, len(splits), make))


def open_folder(folder: layouts.Folder, directory: Path) -> Cache:
    """Return the cache of `folder` in `directory`, built if need be; see `identify_folder`."""
    return identify_folder(folder, directory).open()


def open_drawn(
    seed: int,
    counts: dict[str, int],
    directory: Path,
    draw: Callable[[int, int], tuple[np.ndarray, int]],
    version: int,
) -> Cache:
    """Return the cache of drawn images in `directory`, built if need be; see `identify_drawn`."""
    return identify_drawn(seed, counts, directory, draw, version).open()


def summary(folder: layouts.Folder, cache: Cache) -> str:
    """Return one line on the images in `cache`: numbers by class, broken and ignored files."""
    counts = Counter(cache.labels.tolist())
    classes = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(folder.classes))
    text = f"{len(cache.names)} images ({classes})"
    if cache.broken:
        named = ", ".join(f"{printable(name)} ({reason})" for name, reason in cache.broken[:NAMED])
        more = f" and {len(cache.broken) - NAMED} more" if len(cache.broken) > NAMED else ""
        text += f", {len(cache.broken)} broken and skipped: {named}{more}"
    return (
        f"{text}; {folder.ignored} other file{'s' * (folder.ignored != 1)} ignored"
        if folder.ignored
        else text
    )


def drawn_summary(counts: dict[str, int]) -> str:
    """Return one line on the drawn images, `counts` of each split."""
    return f"{sum(counts.values())} drawn images ({', '.join(f'{split} {count}' for split, count in counts.items())})"


def _sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _kind() -> tuple[int, int, str]:
    """Return what the pixels depend on besides the files."""
    return VERSION, SIZE, PIL.__version__.partition(".")[0]


def _signature(folder: layouts.Folder) -> tuple[str, bool]:
    """Return a hash of the names, sizes and time stamps in `folder`, and whether to rely on it."""
    rows, newest, now = [], 0, time.time_ns()
    for image in folder.images:
        try:
            status = image.path.stat()
        except OSError as error:
            raise UserError(f"cannot read {printable(image.path)}: {error.strerror}.") from error
        rows.append([image.name, image.split, image.label, status.st_size, status.st_mtime_ns])
        if status.st_mtime_ns <= now:
            newest = max(newest, status.st_mtime_ns)
    return _sha256(
        _kind(), str(folder.root.resolve()), folder.classes, rows
    ), now - newest > SETTLED_NS


def _recall(directory: Path, known: Path) -> Cache | None:
    """Return the cache whose digest the file `known` holds, or None."""
    try:
        digest = json.loads(known.read_text(encoding="utf-8"))["digest"]
        return _load(directory / digest[:16], digest)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hashes(folder: layouts.Folder) -> list[str]:
    """Return the SHA-256 of each image file of `folder`; raise UserError if one cannot be read."""

    def work(index: int) -> str:
        path = folder.images[index].path
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {printable(path)}: {error.strerror}.") from error

    return [
        digest
        for block in _blocks("reading the images", work, len(folder.images))
        for digest in block
    ]


def _read(image: layouts.Image, digest: str) -> tuple[np.ndarray | None, Entry]:
    """Return the decoded image, or None if it is broken, and its entry in the index."""
    try:
        if (size := image.path.stat().st_size) > LONGEST:
            reason = f"{size} bytes, more than {LONGEST // 2**20} MiB"
            return None, Entry(image.name, image.label, image.split, digest, reason)
        data = image.path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {printable(image.path)}: {error.strerror}.") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(
            f"{printable(image.path)} changed while the images were being read: run again once it is complete."
        )
    try:
        return decode(data), Entry(image.name, image.label, image.split, digest)
    except BrokenImage as error:
        return None, Entry(image.name, image.label, image.split, digest, str(error))


def _blocks(what: str, work: Callable, count: int) -> Iterator[list]:
    """Yield the results of `work(0)` to `work(count - 1)` in order, in lists of `BLOCK`.

    Threads share a block and finish it before the next begins: memory stays bounded, and an
    exception or a Ctrl-C takes effect soon.
    """
    with Bar(what, count, "images") as bar, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, count, BLOCK):
            results = []
            for result in pool.map(work, range(start, min(start + BLOCK, count))):
                results.append(result)
                bar.step()
            yield results


def _open(
    directory: Path, digest: str, count: int, make: Callable[[int], tuple[np.ndarray | None, Entry]]
) -> Cache:
    """Load the cache `digest`, or build it from `make(0)` to `make(count - 1)`."""
    home = directory / digest[:16]
    cache = _load(home, digest)
    if cache is not None:
        return cache
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(home):
            cache = _load(home, digest)  # another process may have built it meanwhile
            if cache is None:
                _make_room(home, count)
                _build(home, digest, count, make)
                cache = _load(home, digest)
    except OSError as error:
        raise UserError(
            f"cannot write the image cache, {count * ROW} bytes, in {directory}: {error.strerror or error}."
        ) from error
    return cache


def _lock(home: Path) -> FileLock:
    return FileLock(home.with_name(f"{home.name}.lock"))


@contextmanager
def _locked(home: Path):
    """Hold the lock of the cache `home`; the system releases it when the process dies."""
    lock = _lock(home)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("data: waiting for another process, which is building the same image cache")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_room(home: Path, count: int) -> None:
    """Remove a damaged cache and remains of dead builds; raise UserError if space is lacking."""
    if home.exists():
        say("data: the image cache is damaged and is built again")
        shutil.rmtree(home)
    for leftover in home.parent.glob("*.building"):
        if leftover.stem == home.name:  # its lock is held here
            shutil.rmtree(leftover)
            continue
        with (
            suppress(Timeout),
            _lock(leftover.with_suffix("")).acquire(timeout=0),
        ):  # else a live process builds it
            shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(home.parent).free
    if free < count * ROW:
        raise UserError(
            f"the image cache needs {count * ROW} bytes in {home.parent}, where {free} are free: "
            "free some space there, or choose another folder by --checkpoints."
        )


def _build(
    home: Path, digest: str, count: int, make: Callable[[int], tuple[np.ndarray | None, Entry]]
) -> None:
    """Write a whole cache beside `home`, then rename it to `home`."""
    buffer = np.empty((min(count, BLOCK), SIZE, SIZE, 3), np.uint8)

    def work(index: int) -> Entry:
        image, entry = make(index)
        if image is not None:
            buffer[index % BLOCK] = image
        return entry

    temporary = home.with_name(f"{home.name}.building")
    temporary.mkdir()
    try:
        good, broken = [], []
        # A plain file raises an exception if the disk is full; a memory map would kill the process.
        with (temporary / "images.npy").open("wb") as file, warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns of oddities that are common in images of the web
            file.write(_header(0))
            for entries in _blocks("decoding the images", work, count):
                for row, entry in enumerate(entries):
                    if entry.reason is None:
                        file.write(buffer[row])
                        good.append([*entry[:4], zlib.crc32(buffer[row])])
                    else:
                        broken.append((entry.name, entry.reason))
            file.seek(0)
            file.write(_header(len(good)))
            file.flush()
            os.fsync(file.fileno())
        checksums.write(
            temporary / "index",
            json.dumps({"digest": digest, "images": good, "broken": broken}).encode(),
        )
        temporary.rename(home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _header(count: int) -> bytes:
    """Return the header of images.npy; NumPy pads it to the same length for every `count`."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (count, SIZE, SIZE, 3)}
    )
    return head.getvalue()


def _load(home: Path, digest: str) -> Cache | None:
    """Return the cache in `home`, or None if it is missing, damaged or has another digest."""
    content = checksums.read(home / "index")
    if content is None:
        return None
    index = json.loads(content)
    entries = [Entry(*row[:4]) for row in index["images"]]
    header, file = _header(len(entries)), home / "images.npy"
    try:
        with file.open("rb") as opened:
            whole = (
                opened.read(len(header)) == header
                and file.stat().st_size == len(header) + len(entries) * ROW
            )
    except OSError:
        return None
    if not whole or index["digest"] != digest:
        return None
    images = np.memmap(file, np.uint8, "r", len(header), (len(entries), SIZE, SIZE, 3))
    if not _unchanged(images, [checksum for *_, checksum in index["images"]]):
        return None
    return Cache(
        images=images,
        labels=np.array([entry.label for entry in entries], np.int64),
        names=tuple(entry.name for entry in entries),
        splits=tuple(entry.split for entry in entries),
        hashes=tuple(entry.hash for entry in entries),
        broken=tuple((name, reason) for name, reason in index["broken"]),
        digest=digest,
    )


def _unchanged(images: np.memmap, checksums: list[int]) -> bool:
    """Whether the CRC-32 of every image is still that of `checksums`: 10,000 images take half a second."""

    def check(index: int) -> bool:
        return zlib.crc32(images[index]) == checksums[index]

    return all(all(block) for block in _blocks("checking the images", check, len(checksums)))


def _checked(folder: layouts.Folder, cache: Cache) -> Cache:
    """Return `cache`; raise UserError if all images of a class in a split are broken."""
    usable = set(zip(cache.splits, cache.labels.tolist(), strict=True))
    for image in folder.images:
        if (image.split, image.label) not in usable:
            where = f" for {image.split}" if image.split else ""
            name, reason = next(
                (name, reason) for name, reason in cache.broken if name == image.name
            )
            raise UserError(
                f"{folder.root}: none of the {folder.classes[image.label]} images{where} can be read.\n"
                f"{printable(name)}: {reason}."
            )
    return cache
