"""CPUs for one timing at a time: jobs at once time on different CPUs, or take turns."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from utils import progress

CPUS = Path("/sys/devices/system/cpu")
POLL_S = 0.2
_current: ContextVar[frozenset[int]] = ContextVar("cpus", default=frozenset())


@contextlib.contextmanager
def reserved(count: int) -> Iterator[frozenset[int]]:
    """Reserve `count` of the CPUs that this process may use; yields their numbers.

    Workers that start in the block run on them. It waits, with a message, while other timings of
    this user hold too many. The fastest free CPUs are taken; hybrid processors also have slow ones.
    The operating system frees them if the process dies. Where a process cannot choose its CPUs, as
    on macOS and Windows, the set is empty, and timings that run at once disturb each other.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield frozenset()
        return
    allowed = sorted(os.sched_getaffinity(0), key=speed, reverse=True)
    said = False
    while True:
        with contextlib.ExitStack() as stack:
            taken = frozenset(_free(allowed, min(count, len(allowed)), stack))
            if len(taken) == min(count, len(allowed)):
                token = _current.set(taken)
                try:
                    yield taken
                finally:
                    _current.reset(token)
                return
        if not said:
            progress.say(f"timing: waiting for {count} free CPUs, which another timing uses")
            said = True
        time.sleep(POLL_S)


def current() -> frozenset[int]:
    """Return the CPUs that are reserved here and now; empty without a reservation."""
    return _current.get()


def _free(allowed: list[int], count: int, stack: contextlib.ExitStack) -> Iterator[int]:
    """Lock the first `count` CPUs of `allowed` that no other timing has locked; yields them."""
    user = getattr(os, "getuid", lambda: 0)()
    for cpu in allowed:
        if count == 0:
            return
        lock = FileLock(Path(tempfile.gettempdir()) / f"timing_{user}_cpu{cpu}.lock", timeout=0)
        try:
            stack.enter_context(lock)
        except Timeout:
            continue
        count -= 1
        yield cpu


def speed(cpu: int, folder: Path = CPUS) -> tuple[int, int]:
    """Rank a CPU by its highest clock, then by its number.

    Virtual machines do not tell the clock.
    """
    path = folder / f"cpu{cpu}/cpufreq/cpuinfo_max_freq"  # kHz
    return (int(path.read_text()) if path.exists() else 0), cpu
