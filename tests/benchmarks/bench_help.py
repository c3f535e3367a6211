"""Benchmark of --help: its time relative to a Python that does nothing."""

import subprocess
import sys
from collections.abc import Iterator

import paired

from utils import paths


def help(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time one script, since all are alike, and reproduce.py."""
    for script in ("models/resnet18_fp32.py", "reproduce.py"):
        what = f"{script} --help, over python -c pass"
        yield paired.cost(
            what, starts([script, "--help"]), starts(["-c", "pass"]), 5, 1 if settings.smoke else 10
        )


def starts(words: list[str]) -> paired.Turn:
    command = [sys.executable, *words]
    return paired.turn(
        lambda: subprocess.run(command, cwd=paths.ROOT, stdout=subprocess.DEVNULL, check=True), 5
    )
