"""Files of single runs: the JSON with everything, and the answers next to it. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import argparse
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from utils import results
from utils.errors import UserError


def path(args: argparse.Namespace, row: pd.Series, ending: str = "json") -> Path:
    """Path of the JSON of a row's run; with "npz", path of its answers."""
    return args.results / args.study / "runs" / f"{results.run_id(row)}.{ending}"


def record(path: Path, *sections: str) -> dict:
    """Read a run's JSON; raises `UserError` if it is missing, damaged or lacks a section."""
    try:
        content = results.read(path)
        complete = all(section in content for section in sections)
    except (OSError, AttributeError):  # the file is missing, or its JSON is not an object
        complete = False
    if not complete:
        raise UserError(f"{path} is missing or damaged; run its script again.")
    return content


def answers(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a run's logits (n, 2) and the labels (n,) of the test images."""
    try:
        with np.load(path) as content:
            return content["logits"], content["y"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        raise UserError(f"{path} is missing or damaged; run its script again.") from None
