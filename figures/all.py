"""All figures, tables and the report of a study, by the scripts in this folder.

    python figures/all.py --study cats_and_dogs

Tables come first, since they say what there is, and the report last: it takes in the figures. A
script that fails is named with its reason and does not keep the others away; the exit status is 1.
"""

import contextlib
import importlib
import io
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures.shared import script, style  # noqa: F401  (loads matplotlib, before workers are forked)
from utils.errors import UserError

FIRST, LAST = "tables", "report"
WORKERS = 2  # processes; more wait for memory and for the longest figure


def names():
    """Names of the figure scripts: every other script in this folder."""
    others = {Path(__file__).stem, "__init__", FIRST, LAST}
    return sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in others
    )


def attempt(name, frame, args):
    """Run one script; return what it printed, and an error message or None."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module = importlib.import_module(f"figures.{name}")
            if getattr(module, "applies", lambda frame, args: True)(frame, args):
                module.make(frame, args)
        return printed.getvalue(), None
    except (UserError, OSError) as error:
        return printed.getvalue(), str(error)
    except (Exception, SystemExit) as error:  # a mistake in one figure; run alone, it shows where
        return printed.getvalue(), f"{type(error).__name__}: {error}"


def attempts(frame, args):
    """Yield (name, output, error) of every script; forked workers draw where there is `fork`."""
    yield FIRST, *attempt(FIRST, frame, args)
    if "fork" in multiprocessing.get_all_start_methods():
        with workers(WORKERS) as pool:
            futures = {name: pool.submit(attempt, name, frame, args) for name in names()}
            for name, future in futures.items():
                try:
                    yield name, *future.result()
                except BrokenProcessPool:  # a worker died, perhaps with another script
                    yield name, *alone(name, frame, args)
    else:
        for name in names():
            yield name, *attempt(name, frame, args)
    yield LAST, *attempt(LAST, frame, args)


def workers(number):
    """Make a pool of forked processes.

    They have the libraries and the frame at once: importing takes longer than most figures.
    """
    return ProcessPoolExecutor(number, multiprocessing.get_context("fork"))


def alone(name, frame, args):
    """Run one script like `attempt`, in a process that no other script shares."""
    with workers(1) as pool:
        try:
            return pool.submit(attempt, name, frame, args).result()
        except BrokenProcessPool:
            return "", "its process died; is there enough memory?"


def make(frame, args):
    failed = False
    for name, output, error in attempts(frame, args):
        print(output, end="", flush=True)
        if error is not None:
            failed = True
            print(f"error: figures/{name}.py: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    script.run(make, __doc__)
