"""A made-up run, as `utils.results` stores it."""

import numpy as np

from utils import results

LOGITS, Y = np.array([[0.5, -1], [2, 3]], np.float32), np.array([0, 1])


def record(seed=0, model="resnet18", backend="fbgemm", batches=(1, 8), **metrics):
    """A whole record whose every number is another."""
    numbers = iter(range(10 * seed + 1, 10_000))
    found = {section: {name: next(numbers) + 0.25 for name in names} for section, names in results.SECTIONS}
    run = dict(study="drawn", model=model, method="ptq", dtype="int8", backend=backend, device="cpu", simulated=False, seed=seed)
    timing = {name: next(numbers) + 0.5 for section, names in results.SECTIONS if section == "timing" for name in names}
    found |= {"run": run, "timing": [timing | {"batch_size": batch, "contended": True} for batch in batches]}
    found["metrics"] |= {"sqnr_db": None} | metrics
    found["environment"] |= {"isa": ["avx2", "avx512_vnni"], "git_dirty": None}
    found["provenance"] |= {"data_sha256": "a" * 64}
    return found
