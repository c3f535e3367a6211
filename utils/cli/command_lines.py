"""From `Options` back to a command line: for child processes, for records and for a queue."""

import shlex
from pathlib import Path

from utils import cpus, paths
from utils.catalog import Run
from utils.cli.options import DEFAULT_TIMING, Options, dependent_defaults

PATHS = ("data", "init", "results", "checkpoints")  # options that may name a file or a folder


def words(run: Run, options: Options) -> list[str]:
    """Arguments that make the script of `run` run with `options`; defaults are left out."""
    usual, arguments = _defaults(options), []
    for name, value in _values(run, options).items():
        if value is None or value == usual.get(name):
            continue
        values = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{name}", *map(str, values)]
    if options.init_partial and run.method == "fp32":
        arguments.append("--init-partial")
    if options.cuda_graph:
        arguments.append("--cuda-graph")
    if options.again:
        arguments.append("--again")
    if options.profile:
        arguments.append("--profile")
    if options.smoke:
        arguments.append("--smoke")
    return arguments


def _values(run: Run, options: Options) -> dict:
    """Map each option that takes a value to its value in `options`; None means: not given."""
    return {
        "backend": _backend(run, options),
        "data": options.data,
        "classes": options.classes,
        "init": options.init if run.method == "fp32" else None,
        "device": options.device,
        "batch-sizes": ",".join(map(str, options.batch_sizes)),
        "seed": options.seed,
        "threads": options.threads,
        "timing": options.timing,
        "results": options.results,
        "checkpoints": options.checkpoints,
    }


def _defaults(options: Options) -> dict:
    """Map options to their defaults, some of which depend on the others in `options`."""
    dependent = dependent_defaults(options.data, options.smoke)
    return {
        "init": dependent["init"],
        "device": "cpu",
        "batch-sizes": ",".join(map(str, dependent["batch_sizes"])),
        "seed": 0,
        "threads": cpus.default_threads(),
        "timing": DEFAULT_TIMING,
        "results": paths.RESULTS,
        "checkpoints": paths.CHECKPOINTS,
    }


def _backend(run: Run, options: Options) -> str | None:
    """Return the value of `--backend` that gives `options`; None if the script has only one."""
    if options.fastest:
        return "fastest"
    if len(options.backends) > 1:
        return "all"
    return options.backends[0] if len(run.backends) > 1 else None


def command(run: Run, options: Options) -> str:
    """Command that runs the script of `run` with `options` from the repository's root."""
    return shlex.join(["python", run.script, *words(run, options)])


def published_command(run: Run, options: Options) -> str:
    """Like `command`, but with only the last part of each path: it reveals nothing of the disk."""
    names = {name: _last_part(name, getattr(options, name)) for name in PATHS}
    return command(run, options.replace(**names))


def _last_part(name: str, value: str | Path | None) -> str | Path | None:
    """Return the last part of the path that option `name` has; defaults stay as they are."""
    defaults = {"results": paths.RESULTS, "checkpoints": paths.CHECKPOINTS}
    if value is None or value == defaults.get(name):
        return value
    return Path(value).name if isinstance(value, str) else Path(value.name)


def absolute_command(run: Run, options: Options) -> str:
    """Like `command`, but with absolute paths, so that it works from any folder."""
    places = {}
    if options.data not in (None, "kaggle"):
        places["data"] = str(Path(options.data).resolve())
    if options.init not in ("imagenet", "scratch"):
        places["init"] = str(Path(options.init).resolve())
    script = str(paths.ROOT / run.script)
    return shlex.join(["python", script, *words(run, options.replace(**places))])
