"""Benchmark this code against plain counterparts, in rounds that alternate between the two.

    python tests/benchmarks/run.py --data PATH
    python tests/benchmarks/run.py help results_csv

Each row is a ratio with a bootstrap interval over its rounds. Its goal is met ("yes") or missed
("no") if the whole interval is on that side of the goal, and "unclear" otherwise. These are not
tests, because times on a busy machine prove nothing. Without --data, the images are drawn. The
networks of `engines` have random weights, or the weights of --init.
"""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.errors import UserError

BENCHMARKS = {  # name of the function -> its module
    "data_loading": "bench_data",
    "training_step": "bench_training",
    "qat_step": "bench_training",
    "evaluation": "bench_evaluation",
    "engines": "bench_engines",
    "results_csv": "bench_results",
    "help": "bench_help",
}


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        "tests/benchmarks/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"benchmarks to run (default: all): {' '.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "--data", type=cli.folder, metavar="PATH", help="folder of images (default: drawn images)"
    )
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="weights for `engines`; {model} in the name is replaced by the model",
    )
    parser.add_argument("--list", action="store_true", help="print the names and measure nothing")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="do as little as possible, to check that all benchmarks work",
    )
    args = parser.parse_intermixed_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    if args.data and not args.data.exists():
        parser.error(f"no such folder: {args.data}")
    return args


def main(args: argparse.Namespace) -> None:
    if args.list:
        print("\n".join(BENCHMARKS))
        return
    # torch warns of quantize_per_tensor at every start.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import paired  # imports NumPy and scipy, which --help does not need

    print(paired.HEAD, flush=True)
    for name in args.names or BENCHMARKS:
        measure = getattr(importlib.import_module(BENCHMARKS[name]), name)
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(paired.Settings(Path(folder), args.data, args.smoke, args.init)):
                print(row, flush=True)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        print(f"error: tests/benchmarks/run.py: {error}", file=sys.stderr)
        sys.exit(2)
