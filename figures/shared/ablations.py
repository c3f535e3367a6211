"""The tables of quantization/ablation.py, as its figures read them. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import pandas as pd

from utils import catalog
from utils.errors import UserError

KINDS = ("tool", "stacked", "trained", "alone", "varied")
NAMES = {"model": catalog.MODELS, "backend": catalog.BACKENDS, "kind": KINDS}
TEXTS = (*NAMES, "rung", "layer")


def read(args, name="ablation.csv"):
    """Read a table of the study's ladder; an empty frame if there is none.

    Raises `UserError` if it is damaged.
    """
    path = args.results / args.study / name
    if not path.exists():
        return pd.DataFrame()
    try:
        frame = pd.read_csv(path)
        frame = frame.astype(
            {column: float for column in frame if column not in TEXTS} | {"place": int}
        )
        known = all(set(frame[column]) <= set(values) for column, values in NAMES.items())
        if not known or frame["rung"].hasnans or frame.duplicated().any():
            raise ValueError
    except (ValueError, KeyError, OSError):
        raise UserError(f"{path} is damaged; quantization/ablation.py writes it again.") from None
    return frame


def groups(args, name="ablation.csv"):
    """List (model, backend, rows in the order of the rungs) of all ablations of the study.

    Raises `UserError` if there is none.
    """
    frame = read(args, name)
    if frame.empty:
        raise UserError(f"study {args.study} has no {name} yet; run quantization/ablation.py.")
    parts = dict(list(frame.sort_values("place", kind="stable").groupby(["model", "backend"])))
    order = sorted(
        parts,
        key=lambda key: (list(catalog.MODELS).index(key[0]), list(catalog.BACKENDS).index(key[1])),
    )
    return [(*key, parts[key]) for key in order]


def heading(model, backend):
    """Title of a ladder's panel."""
    return f"{catalog.MODELS[model].label}, {backend}"
