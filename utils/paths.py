"""Where things lie: the repository's own folders, and files written so that no reader ever sees half of one."""

import os
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
CHECKPOINTS = ROOT / "checkpoints"


@contextmanager
def atomic(path: Path):
    """Yield a temporary path beside `path`, moved over it only if the block succeeds.

    A crash, a full disk or a Ctrl-C leaves the old file (or none), never a torn one: `os.replace` is atomic within one
    file system, and the temporary file is flushed to disk first.
    """
    import tempfile  # and with it random and shutil, which `--help` has no use for

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
    """Write `text` as UTF-8 with Unix line ends, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
