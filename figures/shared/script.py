"""The command line that all figure scripts share, and how their errors end. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from figures.shared import frames
from utils import cli, paths

Make = Callable[
    [pd.DataFrame, argparse.Namespace], None
]  # draws a figure, or writes tables or the report


def run(
    make: Make,
    doc: str,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Run a figure script; what the user can mend ends it with one line, as `cli.reporting` says.

    `add_options(parser)` declares what only this script understands.
    """
    with cli.reporting(f"figures/{Path(sys.argv[0]).name}"):
        args = parse(doc, add_options)
        make(read(args), args)


def parse(
    doc: str, add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Parse the command line; `out` is None where it was not given."""
    parser = cli.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", default="drawn", help="folder in --results to read (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=paths.RESULTS, metavar="DIR", help="default: results/"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: figures/STUDY/, for tables the study's folder in --results)",
    )
    add_options(parser)
    args = parser.parse_args()
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; give a folder")
    return args


def read(args: argparse.Namespace) -> pd.DataFrame:
    """Read results.csv of the study."""
    return frames.read(args.results / args.study / "results.csv")


def figures_folder(args: argparse.Namespace) -> Path:
    """Folder of the study's figures and its report."""
    return args.out or paths.FIGURES / args.study


def tables_folder(args: argparse.Namespace) -> Path:
    """Folder of the study's tables."""
    return args.out or args.results / args.study
