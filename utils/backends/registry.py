"""Lookup of backends by name; an engine's module is imported only when it is requested."""

import importlib
from collections.abc import Iterator

from utils import progress
from utils.backends.base import Backend
from utils.catalog import BACKENDS
from utils.cli import Options
from utils.errors import CannotRunHere


def get(name: str) -> Backend:
    """Return the backend called `name`, from the ENGINES of its module."""
    return importlib.import_module(f"utils.backends.{BACKENDS[name].module}").ENGINES[name]


def problem(name: str, device: str) -> str | None:
    """Return why backend `name` cannot run on `device` here, in a few words; None if it can."""
    return get(name).problem() if device in BACKENDS[name].devices else f"does not run on {device}"


def select(options: Options) -> Iterator[Backend]:
    """Yield the backends that `--backend` requests and that can run here.

    Says which cannot, and why. Raises `CannotRunHere` with the reasons if none can.
    """
    missing = []
    for name in options.backends:
        if reason := problem(name, options.device):
            missing.append(f"{name}: {reason}")
            progress.say(f"backend {missing[-1]}")
        else:
            yield get(name)
    if len(missing) == len(options.backends):
        raise CannotRunHere("; ".join(missing))
