"""The process of a script: its environment, its signals and how errors end it."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from utils import paths
from utils.catalog import Run
from utils.cli.options import Options, parse
from utils.errors import UserError, printable

INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # exit statuses: 128 + the signal's number
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def run(main: Callable[[Options], None], doc: str, run: Run) -> None:
    """Run a script: parse its command line, then call `main(options)`.

    `doc` is the script's docstring. Errors end the script as `reporting` says.
    """
    with reporting(run.script):
        options = parse(doc, run)
        before_torch(options)
        main(options)


def before_torch(options: Options) -> None:
    """Set the environment variables that torch reads on import, and keep freed memory.

    Child processes inherit the variables, but not the setting of `_keep_freed_memory`.
    """
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    # torch's C++ code warns of quantize_per_tensor at every start, past Python's filters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let this process reuse freed memory, if its C library is glibc.

    By default, glibc returns large blocks to the system, which clears the next one page by page.
    That took 0.21 of the 0.95 CPU seconds of a training step of AlexNet and 0.17 of the 1.92 of
    ResNet-18 (batches of 32 in BF16). The processes that measure networks keep the default.
    mallopt(3) of the Linux manual.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the largest int


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which a scheduler or `kill` asks a process to end."""


@contextlib.contextmanager
def reporting(script: str) -> Iterator[None]:
    """End `script` with one line instead of a traceback on user errors, disk errors and signals.

    The exit status is the `status` of the `UserError`, 2 for a disk that refuses, 130 for Ctrl-C,
    143 for SIGTERM, and 141 if nobody reads the output any more. After Ctrl-C and SIGTERM,
    `finally` blocks still run.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _exit(f"{script}: {error}", error.status)
    except KeyboardInterrupt as error:
        status = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        _exit("interrupted; run the same command again to continue", status)
    except BrokenPipeError:  # after `| head`, or when Ctrl-C has also ended a `tee`
        # An ordinary exit would flush stdout again, and fail.
        os._exit(BROKEN_PIPE)
    except OSError as error:
        refusal = paths.disk_error(error)
        if refusal is None:
            raise
        _exit(f"{script}: {refusal}", refusal.status)


def _terminate(number, frame):
    raise Terminated


def _exit(message: str, status: int) -> None:
    """Print `message` to stderr as an error, with long words shortened, and exit with `status`."""
    message = re.sub(
        r"\S{300,}",
        lambda long: f"{long[0][:100]}...{long[0][-100:]}",
        printable(message, keep="\n"),
    )
    with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
