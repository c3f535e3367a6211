"""The command line of every script: where and how to run. The script's recipe says what.

Nothing heavy is imported here, so that `--help` and a mistyped option are answered at once.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import platform
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import catalog, paths
from utils.catalog import Run
from utils.errors import UserError, printable

BATCH_SIZES = (1, 8, 16, 32, 64)
SMOKE_BATCH_SIZES = (1, 8)
PROTOCOL = "palindromic-rounds/5"  # timing protocol, described in utils/timing/protocol.py
TIMING = ("brief", "quick", "standard", "mlperf")  # how long to time
DEFAULT_TIMING = "quick"
MAX_SEED = 2**32 - 1  # largest seed that both NumPy and torch accept
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PATHS = ("data", "init", "results", "checkpoints")  # options that may name a file or a folder


@dataclass(frozen=True)
class Options:
    """Where and how a script runs: its command line, checked, with all defaults filled in."""

    backends: tuple[str, ...]  # to deploy on
    fastest: bool = (
        False  # deploy only on that of `backends` which is fastest here, see utils/timing/choice.py
    )
    data: str | None = None  # folder of images, "kaggle", or None for drawn images
    classes: tuple[str, str] | None = None  # the two classes to use if the data has more
    init: str = "scratch"  # weights that FP32 training starts from: "imagenet", "scratch" or a file
    device: str = "cpu"  # cpu | cuda
    batch_sizes: tuple[int, ...] = BATCH_SIZES  # to time, ascending
    seed: int = 0
    threads: int = 1
    timing: str = DEFAULT_TIMING
    cuda_graph: bool = False
    profile: bool = False
    results: Path = paths.RESULTS  # absolute
    checkpoints: Path = paths.CHECKPOINTS  # absolute
    smoke: bool = False

    @property
    def protocol(self) -> str:
        """Name of the timing protocol, as in results.csv."""
        return PROTOCOL + "+cuda-graph" * self.cuda_graph

    @property
    def tier(self) -> str:
        """Duration of timing, as in results.csv."""
        return "smoke" if self.smoke else self.timing

    def replace(self, **changes) -> "Options":
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake in one line, without the usage text."""

    def error(self, message: str):
        self.exit(_fail(f"{self.prog}: {printable(message)}. --help lists all options.", 2))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Make a `type` for argparse that accepts whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give a folder")
    return Path(text)


def _batch_sizes(text: str) -> tuple[int, ...]:
    number = whole_number(1, 4096)
    return tuple(sorted({number(part.strip()) for part in text.split(",")}))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that all scripts and reproduce.py share."""
    add = parser.add_argument
    add(
        "--data",
        metavar="PATH|kaggle",
        help="folder of images, or 'kaggle' to download; default: the drawn data set",
    )
    add(
        "--classes",
        nargs=2,
        metavar=("A", "B"),
        help="the two classes to use, if the images have more",
    )
    add("--init", metavar="imagenet|scratch|FILE", help="weights that FP32 training starts from; a FILE is a state dict; "
        "default: imagenet on real images, scratch on drawn ones and in a smoke run")  # fmt: skip
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to train and measure (default: %(default)s)",
    )
    add(
        "--batch-sizes",
        type=_batch_sizes,
        metavar="N[,N...]",
        help="batch sizes to time (default: 1,8,16,32,64)",
    )
    add(
        "--seed",
        type=whole_number(0, MAX_SEED),
        default=0,
        metavar="N",
        help="seed of training (default: %(default)s)",
    )
    add("--threads", type=whole_number(1, 1024), default=cpu_count(), metavar="N",
        help="CPU threads (default: all that this process may use, %(default)s)")  # fmt: skip
    add("--timing", choices=TIMING, default=DEFAULT_TIMING, help="3, 10, 60 or 600 s per batch size (default: %(default)s); "
        "brief does not time one thread beside all, and serves to try things out")  # fmt: skip
    add(
        "--cuda-graph",
        action="store_true",
        help="on a GPU, time the network captured as a CUDA graph",
    )
    add(
        "--profile",
        action="store_true",
        help="also measure the time of each operator, as far as the engine tells",
    )
    add(
        "--results",
        type=_folder,
        default=paths.RESULTS,
        metavar="DIR",
        help="where results go (default: results/)",
    )
    add("--checkpoints", type=_folder, default=paths.CHECKPOINTS, metavar="DIR",
        help="where weights, artifacts and decoded images go (default: checkpoints/)")  # fmt: skip
    add(
        "--smoke",
        action="store_true",
        help="use a few images and seconds: checks that all steps run, measures nothing",
    )


def parser(doc: str, run: Run) -> argparse.ArgumentParser:
    """Build the command line of the script of `run`; `doc` is the script's docstring."""
    several = ("all", "fastest") if run.dtype == "int8" else ("all",)
    choices = (*run.backends, *several) if len(run.backends) > 1 else run.backends
    parser = Parser(
        run.script, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend",
        choices=choices,
        default=choices[0],
        help="engine to deploy on (default: %(default)s)",
    )
    add_options(parser)
    return parser


def cpu_count() -> int:
    """Number of CPUs that this process may use.

    A container or `taskset` may allow fewer than the machine has.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(doc: str, run: Run, argv: list[str] | None = None) -> Options:
    """Parse and check the command line; raises `UserError` if a check of the values fails."""
    given = vars(parser(doc, run).parse_args(argv))
    backend = given.pop("backend")
    names = run.backends_on(given["device"]) if backend in ("all", "fastest") else (backend,)
    if backend == "fastest":
        names = tuple(name for name in names if run.on(name) == run)  # not the control of QAT
    return resolve(names, given | {"fastest": backend == "fastest"})


def resolve(backends: tuple[str, ...], given: dict) -> Options:
    """Turn the values that `add_options` parsed into the `Options` for `backends`.

    Raises `UserError` for values that contradict each other, the machine or the disk.
    """
    defaults = _depending(given["data"], given["smoke"])
    given = given | {name: given[name] or default for name, default in defaults.items()}
    given |= {name: given[name].resolve() for name in ("results", "checkpoints")}
    given |= {"classes": given["classes"] and tuple(given["classes"])}
    options = Options(backends, **given)
    _check(options)
    return options


def _check(options: Options) -> None:
    data, init = options.data, options.init
    for name in options.backends:
        devices = catalog.BACKENDS[name].devices
        if options.device not in devices:
            there = (
                "on a GPU only; add --device cuda."
                if "cpu" not in devices
                else "on the CPU only; leave --device out."
            )
            raise UserError(f"--device {options.device}: {name} runs {there}")
    if options.cuda_graph and options.device != "cuda":
        raise UserError("--cuda-graph needs --device cuda.")
    if options.threads > cpu_count():
        raise UserError(
            f"--threads {options.threads}: this process may use {cpu_count()} CPUs; ask for at most that."
        )
    if data not in (None, "kaggle") and not (data.strip() and Path(data).exists()):
        raise UserError(
            f"--data {printable(data)}: no such folder. Give the folder that holds the images, or 'kaggle'."
        )
    if options.classes and data is None:
        raise UserError(
            "--classes needs --data: the drawn images have only two classes. Leave --classes out."
        )
    if init not in ("imagenet", "scratch") and not Path(init).is_file():
        raise UserError(
            f"--init {printable(init)}: no such file. Give 'imagenet', 'scratch' or a state-dict file."
        )
    for option in ("results", "checkpoints"):
        folder = getattr(options, option)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{option} {printable(folder)}: this is a file; give a folder.")


def words(run: Run, options: Options) -> list[str]:
    """Words of the command line that make the script of `run` run with `options`.

    Defaults are left out.
    """
    usual = _defaults(options)
    said = {
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
    words = []
    for name, value in said.items():
        if value is not None and value != usual.get(name):
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return (
        words
        + ["--cuda-graph"] * options.cuda_graph
        + ["--profile"] * options.profile
        + ["--smoke"] * options.smoke
    )


def _backend(run: Run, options: Options) -> str | None:
    """The value of `--backend` that gives `options`; None if there is no choice."""
    if options.fastest:
        return "fastest"
    return (
        "all"
        if len(options.backends) > 1
        else options.backends[0]
        if len(run.backends) > 1
        else None
    )


def _depending(data: str | None, smoke: bool) -> dict:
    """Return the defaults that depend on other options."""
    return {
        "batch_sizes": SMOKE_BATCH_SIZES if smoke else BATCH_SIZES,
        "init": "scratch" if data is None or smoke else "imagenet",
    }


def _defaults(options: Options) -> dict:
    depending = _depending(options.data, options.smoke)
    return {
        "init": depending["init"],
        "device": "cpu",
        "batch-sizes": ",".join(map(str, depending["batch_sizes"])),
        "seed": 0,
        "threads": cpu_count(),
        "timing": DEFAULT_TIMING,
        "results": paths.RESULTS,
        "checkpoints": paths.CHECKPOINTS,
    }


def command(run: Run, options: Options) -> str:
    """The command that runs the script of `run` with `options` from the repository's root."""
    return shlex.join(["python", run.script, *words(run, options)])


def published_command(run: Run, options: Options) -> str:
    """Like `command`, but with only the last part of every path, for published results.

    These should reveal nothing about the disk.
    """
    given = {name: getattr(options, name) for name in PATHS}
    return command(
        run, options.replace(**{name: _last(value, name) for name, value in given.items()})
    )


def _last(value, name: str):
    default = {"results": paths.RESULTS, "checkpoints": paths.CHECKPOINTS}.get(name)
    if value is None or value == default:
        return value
    return Path(value).name if isinstance(value, str) else Path(value.name)


def absolute_command(run: Run, options: Options) -> str:
    """Like `command`, but with absolute paths, so that it works from any folder."""
    places = {
        "data": options.data not in (None, "kaggle"),
        "init": options.init not in ("imagenet", "scratch"),
    }
    full = {
        name: str(Path(getattr(options, name)).resolve())
        for name, is_path in places.items()
        if is_path
    }
    return shlex.join(
        ["python", str(paths.ROOT / run.script), *words(run, options.replace(**full))]
    )


def init_digest(init: str) -> str:
    """Identify the weights that `--init` names: by the word itself, or by the sha256 of the file."""
    import hashlib  # not at the top: `--help` hashes nothing

    return (
        init
        if init in ("imagenet", "scratch")
        else hashlib.sha256(Path(init).read_bytes()).hexdigest()
    )


def run(main: Callable[[Options], None], doc: str, run: Run) -> None:
    """Run a script: parse the command line, then call `main(options)`.

    Mistakes end it as `reporting` says.
    """
    with reporting(run.script):
        options = parse(doc, run)
        before_torch(options)
        main(options)


def before_torch(options: Options) -> None:
    """Set what torch reads from the environment when it is imported; child processes inherit it.

    What this process alone changes is how it gets memory, see `_keep_freed_memory`.
    """
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    # torch's C++ code warns of quantize_per_tensor at every start, past Python's filters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let this process use freed memory again, where its C library is glibc.

    By default, glibc gives large blocks back to the system, which clears the next one page by page.
    That took 0.21 of the 0.95 CPU seconds of a training step of AlexNet and 0.17 of the 1.92 of
    ResNet-18 (batches of 32 in BF16). The processes in which networks are measured keep the default.
    mallopt(3) of the Linux manual.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the largest int


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a scheduler or `kill` asks a process to end."""


@contextlib.contextmanager
def reporting(script: str) -> Iterator[None]:
    """End `script` with one line where the user, the disk or a signal ends it, not with a traceback.

    The exit status is 2 for a `UserError` or a disk that refuses, 130 for Ctrl-C and 143 for SIGTERM,
    which both let it tidy up, and 141 where nobody reads its output any more.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_fail(f"{script}: {error}", 2))
    except KeyboardInterrupt as error:
        sys.exit(
            _fail(
                "interrupted; run the same command again to continue",
                143 if isinstance(error, Terminated) else 130,
            )
        )
    except BrokenPipeError:  # after `| head`, or when Ctrl-C has ended a `tee`, too
        os._exit(141)  # as SIGPIPE would; an ordinary exit would flush stdout again, and fail
    except OSError as error:
        if (told := paths.disk_error(error)) is None:
            raise
        sys.exit(_fail(f"{script}: {told}", 2))


def _terminate(number, frame):
    raise Terminated


def _fail(message: str, status: int) -> int:
    message = re.sub(
        r"\S{300,}",
        lambda long: f"{long[0][:100]}...{long[0][-100:]}",
        printable(message, keep="\n"),
    )
    with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
        print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _quiet(usual: Callable) -> Callable:
    """Make a hook like `usual` that lets Ctrl-C end the imports of a script without a traceback."""

    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            _fail("interrupted", 130)
        else:
            usual(kind, error, trace)

    return hook


sys.excepthook = _quiet(sys.excepthook)
