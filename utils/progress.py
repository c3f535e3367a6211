"""Progress of long work: a bar with an ETA on a terminal, plain lines in a log.

The functions that draw import tqdm, because `--help` draws nothing.
"""

import sys
import time

from utils import environment
from utils.errors import printable

LOG_EVERY_S = 15.0


def say(text: str) -> None:
    """Print one line now, above any bar on the terminal.

    If several processes train together, only the first one prints.
    """
    if environment.group()[0] > 0:
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        print(printable(text, keep="\n\t"), flush=True)


class Bar:
    """Count `total` steps of the work `what`; use it as a context manager and call `step`.

    On a terminal this is a tqdm bar that clears itself. Anywhere else (a log file, CI) it prints a
    plain line at most every `LOG_EVERY_S` seconds, so logs stay readable and work of a few seconds
    prints nothing.
    """

    def __init__(self, what: str, total: int, unit: str = "it"):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.started = 0, time.monotonic()
        self.last = self.started
        shown = sys.stderr.isatty() and environment.group()[0] == 0
        self.bar = self._draw() if shown else None

    def _draw(self):
        from tqdm import tqdm

        return tqdm(total=self.total, desc=self.what, unit=self.unit, leave=False)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, n: int = 1, note: str = "") -> None:
        """Record `n` more steps, with an optional short note, for example the current loss."""
        self.done += n
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif (now := time.monotonic()) - self.last >= LOG_EVERY_S:
            self.last = now
            left = (now - self.started) / self.done * (self.total - self.done)
            line = f"{self.what}: {self.done}/{self.total} {self.unit}, {left:.0f} s left"
            say(f"{line}, {note}" if note else line)
