"""Files with a checksum: cached values store theirs, artifacts have theirs noted in memory."""

import hashlib
from pathlib import Path

from utils import paths, progress
from utils.errors import UserError

_noted: dict[Path, str] = {}  # SHA-256 of files that this process wrote or trusts


def write(path: Path, content: bytes | memoryview) -> None:
    """Write `content` atomically, after a line with its SHA-256 in hexadecimal."""
    with paths.atomic(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.sha256(content).hexdigest().encode() + b"\n")
        file.write(content)


def read(path: Path) -> bytes | None:
    """Return the content that `write` stored in `path`; None if it is missing or damaged.

    Prints a line if it is damaged.
    """
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if hashlib.sha256(content).hexdigest().encode() == digest:
        return content
    progress.say(f"cache: {path} is damaged and is made again")
    return None


def note(path: Path) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal, and remember it for `check`."""
    _noted[path.resolve()] = digest = sha256_of(path)
    return digest


def check(path: Path) -> None:
    """Raise `UserError` if the file at `path` changed since `note`.

    Most formats of artifacts can run code, so a replaced file must not be loaded.
    """
    noted = _noted.get(path.resolve())
    if noted is not None and noted != sha256_of(path):
        raise UserError(
            f"{path} was replaced while this run used it. "
            "Run it again when nothing else writes to that folder."
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
