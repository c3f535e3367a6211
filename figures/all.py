"""All figures, the tables and the report of a study, from the scripts in this folder.

    python figures/all.py --study cats_and_dogs

Tables come first, since they show what there is. The report comes last, since it shows the figures.
If a script fails, this one names it with the reason, runs the others and exits with status 1.
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
from figures.shared import script, style  # noqa: F401  (loads matplotlib before workers are forked)
from utils.errors import UserError

FIRST, LAST = "tables", "report"
WORKERS = 2  # processes; more would wait for memory and for the slowest figure


def names():
    """Names of the figure scripts: every other script in this folder."""
    others = {Path(__file__).stem, "__init__", FIRST, LAST}
    scripts = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in scripts if path.stem not in others)


def always(frame, args):
    """Default of `applies`, which a script defines if it does not fit every study."""
    return True


def attempt(name, frame, args):
    """Run one script; return its output, and an error message or None."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module = importlib.import_module(f"figures.{name}")
            if getattr(module, "applies", always)(frame, args):
                module.make(frame, args)
        return printed.getvalue(), None
    except (UserError, OSError) as error:
        return printed.getvalue(), str(error)
    except (Exception, SystemExit) as error:  # a bug in one figure; run alone, it shows where
        return printed.getvalue(), f"{type(error).__name__}: {error}"


def attempts(frame, args):
    """Yield (name, output, error) of every script; forked workers draw if there is `fork`."""
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

    They start with the libraries and the frame: importing takes longer than most figures.
    """
    return ProcessPoolExecutor(number, multiprocessing.get_context("fork"))


def alone(name, frame, args):
    """Run one script like `attempt`, in a process that runs no other script."""
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
    script.run(make, __doc__, script.standalone_option)
