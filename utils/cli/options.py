"""Options of the command line: their names, their defaults and their checks."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import catalog, cpus, paths
from utils.catalog import Run
from utils.errors import UserError, printable

BATCH_SIZES = (1, 8, 16, 32, 64)
SMOKE_BATCH_SIZES = (1, 8)
PROTOCOL = "palindromic-rounds/6"  # timing protocol, described in utils/timing/protocol.py
TIMING = ("brief", "quick", "standard", "mlperf")  # how long to time
DEFAULT_TIMING = "quick"
MAX_SEED = 2**32 - 1  # largest seed that both NumPy and torch accept


@dataclass(frozen=True)
class Options:
    """Where and how a script runs: its checked command line, with all defaults filled in."""

    backends: tuple[str, ...]  # to deploy on
    fastest: bool = False  # deploy only on the fastest of `backends`, see utils/timing/choice.py
    data: str | None = None  # folder of images, "kaggle", or None for drawn images
    classes: tuple[str, str] | None = None  # the two classes to use if the data has more
    init: str = "scratch"  # weights that FP32 training starts from: "imagenet", "scratch" or a file
    init_partial: bool = False  # whether tensors outside the classifier may be missing there
    device: str = "cpu"  # cpu | cuda
    batch_sizes: tuple[int, ...] = BATCH_SIZES  # to time, ascending
    seed: int = 0
    threads: int = 1
    timing: str = DEFAULT_TIMING
    cuda_graph: bool = False
    profile: bool = False
    again: bool = False  # time finished runs in another session
    results: Path = paths.RESULTS  # absolute
    checkpoints: Path = paths.CHECKPOINTS  # absolute
    smoke: bool = False

    @property
    def protocol(self) -> str:
        """Name of the timing protocol, as in results.csv."""
        return f"{PROTOCOL}+cuda-graph" if self.cuda_graph else PROTOCOL

    @property
    def tier(self) -> str:
        """Duration of timing, as in results.csv."""
        return "smoke" if self.smoke else self.timing

    def replace(self, **changes) -> "Options":
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `UserError` for a mistake, without the usage text."""

    def error(self, message: str):
        raise UserError(f"{printable(message)}. --help lists all options.")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Make a `type` for argparse that accepts whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return convert


def folder(text: str) -> Path:
    """Convert an argument to a path, as `type` for argparse; `~` is the user's home."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give a folder")
    return Path(text).expanduser()


def _file_or_word(text: str) -> str:
    """Expand `~` in an argument that may also be a word, such as kaggle."""
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _batch_sizes(text: str) -> tuple[int, ...]:
    number = whole_number(1, 4096)
    return tuple(sorted({number(part.strip()) for part in text.split(",")}))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that all scripts and reproduce.py share."""
    _add_inputs(parser)
    _add_measurement(parser)
    parser.add_argument(
        "--results",
        type=folder,
        default=paths.RESULTS,
        metavar="DIR",
        help="where results go (default: results/)",
    )
    parser.add_argument(
        "--checkpoints",
        type=folder,
        default=paths.CHECKPOINTS,
        metavar="DIR",
        help="where weights, artifacts and decoded images go (default: checkpoints/)",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="use a few images and seconds: checks that all steps run, measures nothing",
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """Declare which images and weights to start from."""
    parser.add_argument(
        "--data",
        type=_file_or_word,
        metavar="PATH|kaggle",
        help="folder of images, or 'kaggle' to download; default: the drawn data set",
    )
    parser.add_argument(
        "--classes",
        nargs=2,
        metavar=("A", "B"),
        help="the two classes to use, if the images have more",
    )
    parser.add_argument(
        "--init",
        type=_file_or_word,
        metavar="imagenet|scratch|FILE",
        help="weights that FP32 training starts from; a FILE is a state dict; "
        "default: imagenet on real images, scratch on drawn ones and in a smoke run",
    )
    parser.add_argument(
        "--init-partial",
        action="store_true",
        help="accept a FILE that lacks tensors outside the classifier; they are drawn at random",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, MAX_SEED),
        default=0,
        metavar="N",
        help="seed of training (default: %(default)s)",
    )


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    """Declare where and for how long to measure."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to train and measure (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-sizes",
        type=_batch_sizes,
        metavar="N[,N...]",
        help=f"batch sizes to time (default: {','.join(map(str, BATCH_SIZES))})",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        default=cpus.default_threads(),
        metavar="N",
        help="CPU threads (default: all that this process may use, %(default)s)",
    )
    parser.add_argument(
        "--timing",
        choices=TIMING,
        default=DEFAULT_TIMING,
        help="3, 10, 60 or 600 s per batch size (default: %(default)s); "
        "brief is for quick trials and does not also time one thread",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="on a GPU, time the network captured as a CUDA graph",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="time a finished run in another session, an hour or a restart later, and quantize "
        "nothing: intervals then cover sessions",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also measure the time of each operator, if the engine reports it",
    )


def _script_parser(doc: str, run: Run) -> Parser:
    """Build the parser for the script of `run`; `doc` is the script's docstring."""
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


def parse(doc: str, run: Run, argv: list[str] | None = None) -> Options:
    """Parse and check the command line of the script of `run`; raises `UserError` for a mistake."""
    given = vars(_script_parser(doc, run).parse_args(argv))
    backend = given.pop("backend")
    names = run.backends_on(given["device"]) if backend in ("all", "fastest") else (backend,)
    if backend == "fastest":
        names = tuple(name for name in names if run.on(name) == run)  # not the control of QAT
    return resolve(names, given | {"fastest": backend == "fastest"})


def resolve(backends: tuple[str, ...], given: dict) -> Options:
    """Turn the values that `add_options` parsed into the `Options` for `backends`.

    Raises `UserError` for values that contradict each other, the machine or the disk.
    """
    defaults = dependent_defaults(given["data"], given["smoke"])
    given = given | {name: given[name] or default for name, default in defaults.items()}
    given |= {name: given[name].resolve() for name in ("results", "checkpoints")}
    given |= {"classes": given["classes"] and tuple(given["classes"])}
    options = Options(backends, **given)
    _check_device(options)
    _check_data(options)
    _check_folders(options)
    return options


def dependent_defaults(data: str | None, smoke: bool) -> dict:
    """Return the defaults that depend on other options."""
    return {
        "batch_sizes": SMOKE_BATCH_SIZES if smoke else BATCH_SIZES,
        "init": "scratch" if data is None or smoke else "imagenet",
    }


def _check_device(options: Options) -> None:
    for name in options.backends:
        devices = catalog.BACKENDS[name].devices
        if options.device not in devices:
            if "cpu" in devices:
                advice = "on the CPU only; leave --device out."
            else:
                advice = "on a GPU only; add --device cuda."
            raise UserError(f"--device {options.device}: {name} runs {advice}")
    if options.cuda_graph and options.device != "cuda":
        raise UserError("--cuda-graph needs --device cuda.")
    if options.again and (options.smoke or options.fastest):
        raise UserError("--again times finished runs; leave --smoke and --backend fastest out.")
    if options.threads > cpus.usable():
        raise UserError(
            f"--threads {options.threads}: this process may use {cpus.usable()} CPUs; "
            "ask for at most that many."
        )


def _check_data(options: Options) -> None:
    data, init = options.data, options.init
    if data not in (None, "kaggle") and not (data.strip() and Path(data).exists()):
        raise UserError(
            f"--data {printable(data)}: no such folder. "
            "Give the folder that holds the images, or 'kaggle'."
        )
    if options.classes and data is None:
        raise UserError(
            "--classes needs --data: the drawn images have only two classes. Leave --classes out."
        )
    if init not in ("imagenet", "scratch") and not Path(init).is_file():
        raise UserError(
            f"--init {printable(init)}: no such file. "
            "Give 'imagenet', 'scratch' or a state-dict file."
        )


def _check_folders(options: Options) -> None:
    for option in ("results", "checkpoints"):
        folder = getattr(options, option)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{option} {printable(folder)}: this is a file; give a folder.")


def init_digest(init: str) -> str:
    """Identify the weights that `--init` names: the word itself, or the SHA-256 of the file."""
    import hashlib  # not at the top: `--help` hashes nothing

    if init in ("imagenet", "scratch"):
        return init
    return hashlib.sha256(Path(init).read_bytes()).hexdigest()
