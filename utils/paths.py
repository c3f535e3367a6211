"""Folders of the repository, and atomic writing of files: no reader ever sees half a file."""

import errno
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
CHECKPOINTS = ROOT / "checkpoints"
# Errors of a disk, its settings or a mistaken path, and what the user can do about them.
ADVICE = {
    errno.ENOSPC: "Make room, then run the same command again",
    errno.EDQUOT: "Make room, then run the same command again",
    errno.EFBIG: "Raise the limit, see `ulimit -f`, then run the same command again",
    errno.EACCES: "Give a folder that you may write to",
    errno.EPERM: "Give a folder that you may write to",
    errno.EROFS: "Give a folder that you may write to",
    errno.EIO: "Check the disk",
    errno.EEXIST: "Move what is in the way, or give another folder",
    errno.EISDIR: "Move what is in the way, or give another folder",
    errno.ENOTDIR: "Move what is in the way, or give another folder",
    errno.ENAMETOOLONG: "Give a shorter path",
}
SHOWN = 200  # characters of a path in a message


def disk_error(error: OSError, path: Path | None = None) -> UserError | None:
    """Turn the error of a disk into one line with advice; None for errors of another kind.

    The line names `path`, by default the file that `error` names.
    """
    if error.errno not in ADVICE:
        return None
    name = str(path or error.filename or "the output")
    name = name if len(name) <= SHOWN else f"...{name[-SHOWN:]}"
    verb = "write" if path or not error.filename else "use"
    return UserError(f"cannot {verb} {name}: {error.strerror}. {ADVICE[error.errno]}.")


@contextmanager
def atomic(path: Path):
    """Yield a temporary path next to `path`, and move its file to `path` if the block succeeds.

    A crash, a full disk or Ctrl-C leaves the old file (or none), never half a file: `os.replace` is
    atomic within one file system, and the temporary file is flushed to disk first. If the process
    is killed, `sweep` removes the temporary file later. Raises `UserError` if the disk refuses.
    """
    import tempfile  # slow to import, and not needed for `--help`

    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.{_host()}.{os.getpid()}.", suffix=".tmp"
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files; results are meant to be read
        temporary.replace(path)
    except OSError as error:
        raise (disk_error(error, path) or error) from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, as UTF-8 with Unix line ends."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def probe(folder: Path) -> None:
    """Make `folder`, write to it, and remove the temporary files of killed processes.

    Raises `UserError` if the disk refuses. Call it before hours of work whose results go there.
    """
    with atomic(folder / ".probe") as temporary:
        temporary.write_bytes(bytes(4096))
    (folder / ".probe").unlink(missing_ok=True)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove the temporary files of dead processes from `folder`, at any depth.

    Files of other machines stay, because this machine cannot see whether their processes live.
    """
    import psutil

    for path in folder.rglob(".*.tmp"):
        owner, *rest = path.name.rsplit(".", 3)
        if (
            owner.endswith(f".{_host()}")
            and rest[0].isdecimal()
            and not psutil.pid_exists(int(rest[0]))
        ):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _host() -> str:
    """Name of this machine, short enough for a file name."""
    import platform

    return platform.node()[:32] or "here"
