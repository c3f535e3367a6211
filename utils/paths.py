"""Folders of the repository, and writing of files of which no reader ever sees half."""

import os
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
CHECKPOINTS = ROOT / "checkpoints"


@contextmanager
def atomic(path: Path):
    """Yield a temporary path beside `path`, and move its file to `path` if the block succeeds.

    A crash, a full disk or Ctrl-C leaves the old file (or none), never half a file: `os.replace` is
    atomic within one file system, and the temporary file is flushed to disk first.
    """
    import tempfile  # also imports random and shutil, which `--help` does not need

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files; results are meant to be read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, as UTF-8 with Unix line ends."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
