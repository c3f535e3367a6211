"""Tables of quantization/ablation.py, as its figures read them. No torch."""

if __name__ == "__main__":
    import no_script  # noqa: F401

import pandas as pd

from utils import catalog
from utils.errors import UserError

STEP_KINDS = ("tool", "stacked", "trained", "alone", "varied", "cause")
VALUES = {"model": catalog.MODELS, "backend": catalog.BACKENDS, "kind": STEP_KINDS}
# Columns that do not hold numbers; a rung is a step.
TEXTS = (*VALUES, "rung", "layer", "overflow", "method_code")


def read(args, name="ablation.csv"):
    """Read a table of the study's ablation; an empty frame if there is none.

    Raises `UserError` if it is damaged.
    """
    path = args.results / args.study / name
    if not path.exists():
        return pd.DataFrame()
    try:
        frame = pd.read_csv(path)
        numbers = {column: float for column in frame if column not in TEXTS}
        frame = frame.astype(numbers | {"place": int})
        known = all(set(frame[column]) <= set(values) for column, values in VALUES.items())
        if not known or frame["rung"].hasnans or frame.duplicated().any():
            raise ValueError
    except (ValueError, KeyError, OSError):
        raise UserError(f"{path} is damaged; quantization/ablation.py writes it again.") from None
    return frame


def groups(args, name="ablation.csv"):
    """List (model, backend, rows in the order of the steps) of the study's ablations.

    Raises `UserError` if there is none.
    """
    frame = read(args, name)
    if frame.empty:
        raise UserError(f"study {args.study} has no {name} yet; run quantization/ablation.py.")
    parts = dict(list(frame.sort_values("place", kind="stable").groupby(["model", "backend"])))
    models, backends = list(catalog.MODELS), list(catalog.BACKENDS)
    order = sorted(parts, key=lambda key: (models.index(key[0]), backends.index(key[1])))
    return [(*key, parts[key]) for key in order]


def heading(model, backend):
    """Title of a panel."""
    return f"{catalog.MODELS[model].label}, {backend}"
