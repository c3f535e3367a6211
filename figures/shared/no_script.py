"""Refuse to run a helper as a script: helpers then import this before anything else."""

import sys
from pathlib import Path

name = Path(sys.argv[0]).name
print(
    f"error: figures/shared/{name} is not a script; run one in figures/, such as: "
    "python figures/all.py",
    file=sys.stderr,
)
sys.exit(2)
