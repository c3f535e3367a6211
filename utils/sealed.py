"""Cached values on disk, each behind the SHA-256 of its bytes: what was damaged is noticed, and made again."""

import hashlib
from pathlib import Path

from utils import paths, progress


def write(path: Path, content: bytes | memoryview) -> None:
    """Write `content` atomically, with a first line that holds its SHA-256 in hexadecimal."""
    with paths.atomic(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.sha256(content).hexdigest().encode() + b"\n")
        file.write(content)


def read(path: Path) -> bytes | None:
    """Return what was written to `path`; None if the file is missing, or damaged, which is said in a line."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if hashlib.sha256(content).hexdigest().encode() == digest:
        return content
    progress.say(f"cache: {path} is damaged and is made again")
    return None
