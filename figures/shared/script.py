"""Command line and error handling of all figure scripts. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from figures.shared import frames
from utils import cli, paths

# Draws a figure, or writes the tables or the report.
Make = Callable[[pd.DataFrame, argparse.Namespace], None]
Options = Callable[[argparse.ArgumentParser], None]


def no_options(parser: argparse.ArgumentParser) -> None:
    """Add nothing to the common options."""


def standalone_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the report, which figures/all.py also accepts."""
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="embed the figures in report.html instead of linking to the PNGs next to it",
    )


def run(make: Make, doc: str, add_options: Options = no_options) -> None:
    """Run a figure script; an error of the user ends it with one line (see `cli.reporting`).

    `add_options(parser)` adds the options that only this script has.
    """
    with cli.reporting(f"figures/{Path(sys.argv[0]).name}"):
        args = parse(doc, add_options)
        make(read(args), args)


def parse(doc: str, add_options: Options = no_options) -> argparse.Namespace:
    """Parse the command line; `out` is None if it was not given."""
    parser = cli.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", default="drawn", help="folder in --results to read (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=cli.folder, default=paths.RESULTS, metavar="DIR", help="default: results/"
    )
    parser.add_argument(
        "--out",
        type=cli.folder,
        metavar="DIR",
        help="folder to write to (default: figures/STUDY/; for tables, the study's folder in "
        "--results)",
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
    """Folder for the figures and the report of the study."""
    return args.out or paths.FIGURES / args.study


def tables_folder(args: argparse.Namespace) -> Path:
    """Folder for the tables of the study."""
    return args.out or args.results / args.study
