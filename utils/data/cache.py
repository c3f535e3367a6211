"""Images decoded once, in a memory-mapped array keyed by everything that decides the pixels.

A cache is a folder with images.npy and an index, which has a checksum of each image. It is built
under a lock, next to its final place, and renamed when complete. So whenever a process is killed,
no reader sees half a cache. A cache that was damaged later is built again.
"""

import hashlib
import io
import json
import os
import shutil
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import PIL.features
from filelock import FileLock, Timeout

from utils import checksums, cpus, environment, paths
from utils.data import decoding, layouts, synthetic
from utils.data.decoding import SIZE, BrokenImage
from utils.errors import UserError, printable
from utils.progress import Bar, say

ROW = SIZE * SIZE * 3  # bytes of one image
BLOCK = 128  # images in memory at a time
THREADS = min(16, cpus.usable())
LONGEST = 2**29  # bytes of a file
NAMED = 5  # broken images that the summary names
# A file that changed within this time may change again under the same time stamp.
SETTLED_NS = 2_000_000_000
CODECS = ("jpg", "libjpeg_turbo", "webp", "libtiff")  # of Pillow, for lossy formats


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
    """A cache whose content is known but which may not exist yet.

    `digest` is the digest of the cache. `open()` returns the cache and builds it if it is missing;
    it prints progress and raises UserError, see `identify_folder` and `identify_synthetic`.
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


@dataclass(frozen=True)
class Key:
    """What a cache is found by: its content, and how the pixels are made of it.

    `digest` identifies the data, so it goes into every record. `pixels` holds the code and the
    versions that decode or draw the content; they may change without a change of the data.
    """

    directory: Path
    digest: str
    pixels: dict

    @property
    def home(self) -> Path:
        """Folder of the cache."""
        return self.directory / _sha256(self.digest, self.pixels)[:16]


Make = Callable[[int], tuple[np.ndarray | None, Entry]]  # makes the image at an index


def _decoder() -> dict:
    """Code and versions that decide the pixels of a file."""
    codecs = {codec: PIL.features.version(codec) for codec in CODECS}
    code = environment.code_of("utils.data.decoding")
    return {"code": code, "pillow": PIL.__version__, **codecs}


def _painter() -> dict:
    """Code, versions and processor that decide the pixels of a drawn image.

    NumPy's sine depends on the instruction set: without AVX2, one image in 300 differs.
    """
    return {
        "code": environment.code_of("utils.data.synthetic"),
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "isa": list(environment.cpu()[1]),
    }


def identify_folder(folder: layouts.Folder, directory: Path) -> Pending:
    """Return the cache of `folder` in `directory` with its digest; nothing is decoded yet.

    The files are read only if a name, size or modification time changed since the last time. They
    are decoded, by `open()`, only if a name or a content changed, or the code or a library that
    decodes them.

    Raises UserError if a file cannot be read. `open()` raises it if a file changes meanwhile, if
    the cache cannot be written or does not fit on the disk, or if all images of a class in a split
    are broken.
    """
    directory, pixels = Path(directory), _decoder()
    signature, settled = _signature(folder, pixels)
    known = directory / "known" / f"{signature}.json"
    cache = _recall(directory, known, pixels)
    if cache is not None:
        return Pending(cache.digest, lambda: _checked(folder, cache))
    hashes = _hashes(folder)
    candidates = [
        [image.name, image.split, image.label, content]
        for image, content in zip(folder.images, hashes, strict=True)
    ]
    key = Key(directory, _sha256(_kind(), folder.classes, candidates), pixels)

    def build() -> Cache:
        cache = _open(key, len(hashes), lambda index: _read(folder.images[index], hashes[index]))
        if settled:
            with suppress(OSError):  # only a shortcut: a prepared cache may be read-only
                paths.write_text(known, json.dumps({"digest": key.digest}) + "\n")
        return _checked(folder, cache)

    return Pending(key.digest, build)


def identify_synthetic(seed: int, counts: dict[str, int], directory: Path) -> Pending:
    """Return the cache of synthetic images in `directory` with its digest; nothing is drawn yet.

    `counts` maps splits to numbers of images, in the order of their indices. The digest depends on
    `synthetic.VERSION`, `seed` and `counts`.

    `open()` raises UserError if the cache cannot be written or does not fit on the disk.
    """
    splits = [split for split, count in counts.items() for _ in range(count)]
    digest = _sha256(_kind(), "drawn", synthetic.VERSION, seed, list(counts.items()))

    def make(index: int) -> tuple[np.ndarray, Entry]:
        image, label = synthetic.draw(seed, index)
        name = f"{splits[index]}/{index:06d}"
        content = hashlib.sha256(image.tobytes()).hexdigest()
        return image, Entry(name, int(label), splits[index], content)

    key = Key(Path(directory), digest, _painter())
    return Pending(digest, lambda: _open(key, len(splits), make))


def summary(folder: layouts.Folder, cache: Cache) -> str:
    """Return one line on the images in `cache`: numbers by class, broken and ignored files."""
    counts = Counter(cache.labels.tolist())
    classes = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(folder.classes))
    text = f"{len(cache.names)} images ({classes}), {folder.layout}"
    if cache.broken:
        named = ", ".join(f"{printable(name)} ({reason})" for name, reason in cache.broken[:NAMED])
        text += f", {len(cache.broken)} broken and skipped: {named}"
    if len(cache.broken) > NAMED:
        text += f" and {len(cache.broken) - NAMED} more"
    if folder.ignored:
        text += f"; {folder.ignored} other file{'' if folder.ignored == 1 else 's'} ignored"
    return text


def synthetic_summary(counts: dict[str, int]) -> str:
    """Return one line on the synthetic images, `counts` of each split."""
    parts = ", ".join(f"{split} {count}" for split, count in counts.items())
    return f"{sum(counts.values())} drawn images ({parts})"


def _sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _kind() -> tuple[int, int, str]:
    """Return the part of the data's identity that all data sets share."""
    return decoding.VERSION, SIZE, PIL.__version__.partition(".")[0]


def _signature(folder: layouts.Folder, pixels: dict) -> tuple[str, bool]:
    """Return a hash of `pixels` and all names, sizes and time stamps, and whether to rely on it."""
    rows, newest, now = [], 0, time.time_ns()
    for image in folder.images:
        try:
            status = image.path.stat()
        except OSError as error:
            raise UserError(f"cannot read {printable(image.path)}: {error.strerror}.") from error
        rows.append([image.name, image.split, image.label, status.st_size, status.st_mtime_ns])
        if status.st_mtime_ns <= now:
            newest = max(newest, status.st_mtime_ns)
    signature = _sha256(_kind(), pixels, str(folder.root.resolve()), folder.classes, rows)
    return signature, now - newest > SETTLED_NS


def _recall(directory: Path, known: Path, pixels: dict) -> Cache | None:
    """Return the cache whose digest the file `known` holds, or None."""
    try:
        digest = json.loads(known.read_text(encoding="utf-8"))["digest"]
        return _load(Key(directory, digest, pixels))
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

    blocks = _blocks("reading the images", work, len(folder.images))
    return [digest for block in blocks for digest in block]


def _read(image: layouts.Image, digest: str) -> tuple[np.ndarray | None, Entry]:
    """Return the decoded image, or None if it is broken, and its entry in the index."""
    entry = Entry(image.name, image.label, image.split, digest)
    try:
        if (size := image.path.stat().st_size) > LONGEST:
            return None, entry._replace(reason=f"{size} bytes, more than {LONGEST // 2**20} MiB")
        data = image.path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {printable(image.path)}: {error.strerror}.") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(
            f"{printable(image.path)} changed while the images were being read: "
            "run again once it is complete."
        )
    try:
        return decoding.decode(data), entry
    except BrokenImage as error:
        return None, entry._replace(reason=str(error))


def _blocks(what: str, work: Callable, count: int) -> Iterator[list]:
    """Yield the results of `work(0)` to `work(count - 1)` in order, in lists of `BLOCK`.

    Threads share a block and finish it before the next begins. So memory stays bounded, and an
    exception or Ctrl-C takes effect soon.
    """
    with Bar(what, count, "images") as bar, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, count, BLOCK):
            results = []
            for result in pool.map(work, range(start, min(start + BLOCK, count))):
                results.append(result)
                bar.step()
            yield results


def _open(key: Key, count: int, make: Make) -> Cache:
    """Load the cache `key`, or build it from `make(0)` to `make(count - 1)`."""
    cache = _load(key)
    if cache is not None:
        return cache
    try:
        key.directory.mkdir(parents=True, exist_ok=True)
        with _locked(key.home):
            cache = _load(key)  # another process may have built it meanwhile
            if cache is None:
                _make_room(key.home, count)
                _build(key, count, make)
                cache = _load(key)
    except OSError as error:
        raise UserError(
            f"cannot write the image cache, {count * ROW} bytes, in {key.directory}: "
            f"{error.strerror or error}."
        ) from error
    return cache


def _lock(home: Path) -> FileLock:
    return FileLock(home.with_name(f"{home.name}.lock"))


@contextmanager
def _locked(home: Path):
    """Hold the lock of the cache `home`; the system releases it if the process dies."""
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
        if leftover.stem == home.name:  # this process holds its lock
            shutil.rmtree(leftover)
            continue
        # If the lock is taken, a live process is building there.
        with suppress(Timeout), _lock(leftover.with_suffix("")).acquire(timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(home.parent).free
    if free < count * ROW:
        raise UserError(
            f"the image cache needs {count * ROW} bytes in {home.parent}, where {free} are free: "
            "free some space there, or choose another folder by --checkpoints."
        )


def _build(key: Key, count: int, make: Make) -> None:
    """Write a whole cache next to its folder, then rename it to that folder."""
    temporary = key.home.with_name(f"{key.home.name}.building")
    temporary.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities common in images of the web
            good, broken = _write_images(temporary / "images.npy", count, make)
        index = {"digest": key.digest, "pixels": key.pixels, "images": good, "broken": broken}
        checksums.write(temporary / "index", json.dumps(index).encode())
        temporary.rename(key.home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_images(path: Path, count: int, make: Make) -> tuple[list, list]:
    """Write the good images to `path`; return their entries with checksums, and the broken ones."""
    buffer = np.empty((min(count, BLOCK), SIZE, SIZE, 3), np.uint8)

    def work(index: int) -> Entry:
        image, entry = make(index)
        if image is not None:
            buffer[index % BLOCK] = image
        return entry

    good, broken = [], []
    # A plain file raises an exception if the disk is full; a memory map would kill the process.
    with path.open("wb") as file:
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
    return good, broken


def _header(count: int) -> bytes:
    """Return the header of images.npy; NumPy pads it to the same length for every `count`."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (count, SIZE, SIZE, 3)}
    )
    return head.getvalue()


def _load(key: Key) -> Cache | None:
    """Return the cache `key`, or None if it is missing or damaged."""
    content = checksums.read(key.home / "index")
    if content is None:
        return None
    index = json.loads(content)
    entries = [Entry(*row[:4]) for row in index["images"]]
    header, file = _header(len(entries)), key.home / "images.npy"
    size = len(header) + len(entries) * ROW
    try:
        with file.open("rb") as opened:
            whole = opened.read(len(header)) == header and file.stat().st_size == size
    except OSError:
        return None
    if not whole or index["digest"] != key.digest or index["pixels"] != key.pixels:
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
        digest=key.digest,
    )


def _unchanged(images: np.memmap, checksums: list[int]) -> bool:
    """Whether each image still has its CRC-32 in `checksums`; 10,000 images take half a second."""

    def check(index: int) -> bool:
        return zlib.crc32(images[index]) == checksums[index]

    return all(all(block) for block in _blocks("checking the images", check, len(checksums)))


def _checked(folder: layouts.Folder, cache: Cache) -> Cache:
    """Return `cache`; raise UserError if all images of a class in a split are broken."""
    usable = set(zip(cache.splits, cache.labels.tolist(), strict=True))
    reasons = dict(cache.broken)
    for image in folder.images:
        if (image.split, image.label) not in usable:
            kind = folder.classes[image.label]
            where = f" for {image.split}" if image.split else ""
            raise UserError(
                f"{folder.root}: none of the {kind} images{where} can be read.\n"
                f"{printable(image.name)}: {reasons[image.name]}."
            )
    return cache
