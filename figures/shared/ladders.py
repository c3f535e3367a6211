"""The tables of quantization/int8_ladder.py, as its figures read them. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import pandas as pd

from utils import catalog
from utils.errors import UserError


def read(args, name="ladder.csv"):
    """Read a table of the study's ladder; an empty frame if there is none."""
    path = args.results / args.study / name
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def groups(args, name="ladder.csv"):
    """List (model, backend, rows in the order of the rungs) of all ladders of the study.

    Raises `UserError` if there is none.
    """
    frame = read(args, name)
    if frame.empty:
        raise UserError(f"study {args.study} has no {name} yet; run quantization/int8_ladder.py.")
    parts = dict(list(frame.sort_values("place", kind="stable").groupby(["model", "backend"])))
    order = sorted(parts, key=lambda key: (list(catalog.MODELS).index(key[0]), list(catalog.BACKENDS).index(key[1])))
    return [(*key, parts[key]) for key in order]


def heading(model, backend):
    """Title of a ladder's panel."""
    return f"{catalog.MODELS[model].label}, {backend}"
