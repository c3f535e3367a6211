"""The command line, the same for every script: it says where and how to run, the script's recipe says what.

Nothing heavy is imported here, so that `--help` and a mistyped option answer at once.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import paths
from utils.errors import UserError

BACKENDS = {  # what --backend accepts for each (method, dtype), default first
    ("fp32", "fp32"): ("native",),
    ("ptq", "int8"): ("fbgemm", "x86", "onednn", "qnnpack"),
    ("ptq", "fp16"): ("half", "amp"),
    ("ptq", "int16"): ("simulated",),
    ("qat", "int8"): ("fbgemm", "x86", "onednn", "qnnpack", "native"),
    ("qat", "fp16"): ("half", "amp"),
    ("qat", "int16"): ("simulated",),
}
BATCH_SIZES = (1, 8, 16, 32, 64)
SMOKE_BATCH_SIZES = (1, 8)
PROTOCOL = "palindromic-rounds/5"  # of timing, described in `utils/timing.py`
TIMING = ("quick", "standard", "mlperf")  # how long to time
MAX_SEED = 2**32 - 1  # numpy's generators and torch's agree on this range


@dataclass(frozen=True)
class Run:
    """What a script stands for: one model, one method, one number format."""

    model: str  # alexnet | resnet18 | mobilenetv3
    method: str  # fp32 | ptq | qat | control
    dtype: str  # fp32 | fp16 | int16 | int8

    @property
    def name(self) -> str:
        """Name in file names, such as `resnet18_ptq_int8` or `resnet18_fp32`."""
        return f"{self.model}_fp32" if self.method == "fp32" else f"{self.model}_{self.method}_{self.dtype}"

    @property
    def script(self) -> str:
        """The script's path from the repository root."""
        if self.method == "control":
            return Run(self.model, "qat", "int8").script
        return f"models/{self.name}.py" if self.method == "fp32" else f"quantization/{self.method}/{self.name}.py"

    def on(self, backend: str) -> "Run":
        """What running this on `backend` stands for: QAT without quantization is its own control, FP32 fine-tuned alike."""
        return Run(self.model, "control", "fp32") if self.method == "qat" and backend == "native" else self


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _batch_sizes(text: str) -> tuple[int, ...]:
    number = _whole_number(1, 4096)
    return tuple(sorted({number(part.strip()) for part in text.split(",")}))


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is answered in one line, without the usage of every option before it."""

    def error(self, message: str):
        self.exit(2, f"error: {self.prog}: {message}. --help lists all options.\n")


def parser(doc: str, run: Run) -> argparse.ArgumentParser:
    """The command line of the script that stands for `run`; `doc` is the script's docstring."""
    backends = BACKENDS[run.method, run.dtype]
    choices = (*backends, "all") if len(backends) > 1 else backends
    parser = Parser(run.script, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="PATH|kaggle", help="folder of images, or 'kaggle' to download; default: the drawn data set")
    add("--init", metavar="imagenet|scratch|FILE", help="weights that FP32 training starts from; a FILE is a state dict; "
        "default: imagenet on real images, scratch on drawn ones and in a smoke run")  # fmt: skip
    add("--backend", choices=choices, default=choices[0], help="engine to deploy on (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train and measure (default: %(default)s)")
    add("--batch-sizes", type=_batch_sizes, metavar="N[,N...]", help="batch sizes to time (default: 1,8,16,32,64)")
    add(
        "--seed",
        type=_whole_number(0, MAX_SEED),
        default=0,
        metavar="N",
        help="seed of training (default: %(default)s)",
    )
    add("--threads", type=_whole_number(1, 1024), default=cpu_count(), metavar="N",
        help="CPU threads (default: all of this machine, %(default)s)")  # fmt: skip
    add("--timing", choices=TIMING, default=TIMING[0], help="10, 60 or 600 s for a batch size (default: %(default)s)")
    add("--cuda-graph", action="store_true", help="on a GPU, time the network captured as a CUDA graph")
    add("--results", type=Path, default=paths.RESULTS, metavar="DIR", help="where results go (default: results/)")
    add("--checkpoints", type=Path, default=paths.CHECKPOINTS, metavar="DIR",
        help="where weights, artifacts and decoded images go (default: checkpoints/)")  # fmt: skip
    add("--smoke", action="store_true", help="a few images and seconds: checks that the path works, measures nothing")
    return parser


def cpu_count() -> int:
    """CPUs this process may use (a container or `taskset` may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(doc: str, run: Run, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; raises `UserError` for values that cannot work together."""
    args = parser(doc, run).parse_args(argv)
    args.batch_sizes = args.batch_sizes or (SMOKE_BATCH_SIZES if args.smoke else BATCH_SIZES)
    args.backends = BACKENDS[run.method, run.dtype] if args.backend == "all" else (args.backend,)
    args.init = args.init or ("scratch" if args.data is None or args.smoke else "imagenet")
    if args.device == "cuda" and run.dtype == "int8" and args.backend != "native":
        raise UserError("--device cuda: torch's INT8 engines run on the CPU only; leave --device out.")
    if args.cuda_graph and args.device != "cuda":
        raise UserError("--cuda-graph needs --device cuda.")
    if args.threads > cpu_count():
        raise UserError(f"--threads {args.threads}: this process may use {cpu_count()} CPUs; ask for at most that.")
    if args.data not in (None, "kaggle") and not Path(args.data).exists():
        raise UserError(f"--data {args.data}: no such folder. Give the folder that holds the images, or 'kaggle'.")
    if args.init not in ("imagenet", "scratch") and not Path(args.init).is_file():
        raise UserError(f"--init {args.init}: no such file. Give 'imagenet', 'scratch' or a state-dict file.")
    for option in ("results", "checkpoints"):
        folder = getattr(args, option).resolve()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{option} {folder}: this is a file; give a folder.")
        setattr(args, option, folder)
    return args


def protocol(args: argparse.Namespace) -> str:
    """How `args` have it timed, as the rows name it."""
    return PROTOCOL + "+cuda-graph" * args.cuda_graph


def command(run: Run, args: argparse.Namespace, backend: str | None = None, private: bool = False) -> str:
    """The command that runs `run` as `args` say: on the same data, into the same folders, timed alike; defaults are left out.

    With `private`, folders are given by their last name only: a result that is published should not tell what the disk of
    its author looks like.
    """
    given = {"backend": backend if run.method != "fp32" else None, "data": args.data}
    given |= {"init": args.init if run.method == "fp32" else None, "seed": args.seed or None}
    given |= {name: getattr(args, name) for name in ("device", "threads", "timing", "results", "checkpoints")}
    given["batch-sizes"] = ",".join(map(str, args.batch_sizes))
    usual = SMOKE_BATCH_SIZES if args.smoke else BATCH_SIZES
    defaults = {"device": "cpu", "threads": cpu_count(), "timing": TIMING[0], "batch-sizes": ",".join(map(str, usual))}
    defaults |= {"results": paths.RESULTS, "checkpoints": paths.CHECKPOINTS}
    words = ["python", run.script]
    for option, value in given.items():
        if value is not None and value != defaults.get(option):
            value = Path(value).name if private and option in ("data", "init", "results", "checkpoints") else value
            words += [f"--{option}", str(value)]
    return shlex.join(words + ["--cuda-graph"] * args.cuda_graph + ["--smoke"] * args.smoke)


def run(main: Callable[[argparse.Namespace], None], doc: str, run: Run) -> None:
    """Run a script: parse, call `main(args)`, and turn what the user can mend into one line and exit status 2."""
    try:
        args = parse(doc, run)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read once, when torch is imported; child processes inherit it
        # torch's C++ side warns of quantize_per_tensor at every start, past Python's filters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        main(args)
    except UserError as error:
        sys.exit(_fail(f"{run.script}: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; the same command goes on from the last finished epoch", 130))


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status
