"""Sensitivity of blocks to quantization, and the choice of those that stay in FP32.

`keep_fp32="auto"` in a recipe stands for the fewest of the most sensitive blocks that must stay in
FP32 to meet the recipe's budget.

The method is the layer-wise sensitivity analysis of Wu et al. 2020, "Integer Quantization for Deep
Learning Inference: Principles and Empirical Evaluation" (arXiv:2004.09602), section 5.1: quantize
each layer alone, rank the layers, and leave the worst in floating point. Here the unit is a block,
and the rank is by SQNR, which distinguishes blocks on 100 images where accuracy does not.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from utils import metrics, progress
from utils.data.splits import Split
from utils.errors import UserError
from utils.quantize.layers import WEIGHTED
from utils.quantize.reference import execute
from utils.training.loop import Predictor, predict

SIZES = {"images": 100, "calibration_images": 64}  # defaults of the recipe's `auto`
BUDGETS = {"sqnr_db": "sqnr_db >= {}", "accuracy_drop": "accuracy_drop <= {}"}


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the blocks of `model`, in the order of their definition.

    In the study's networks that is the order of computation. A block is a child of the model, or of
    a plain `nn.Sequential` in it at any depth, that contains a convolution or linear layer.
    Subclasses of `nn.Sequential` are blocks, not containers. Every convolution or linear layer is
    in exactly one block.
    """
    names = []
    for name, child in model.named_children():
        if type(child) is nn.Sequential:
            names.extend(f"{name}.{inner}" for inner in blocks(child))
        elif any(isinstance(module, WEIGHTED) for module in child.modules()):
            names.append(name)
    return tuple(names)


def scan(
    quantize: Callable[[tuple[str, ...]], Predictor], names: tuple[str, ...], reference: np.ndarray, validation: Split
) -> dict[str, float | None]:
    """Measure the SQNR of the logits with one block quantized and the others in FP32, by block.

    Returns dB on `validation` (None: no noise) for each of `names`. `quantize(keep)` returns the
    network with the blocks `keep` in FP32; `reference` are the FP32 network's logits, float32
    (len(validation), 2). Raises `ValueError` if a logit is not finite.
    """
    sqnr = {}
    with progress.Bar("sensitivity scan", len(names), "blocks") as bar:
        for name in names:
            predictor = quantize(tuple(other for other in names if other != name))
            sqnr[name] = metrics.sqnr_db(reference, _logits(predictor, validation))
            bar.step(note=name)
    return sqnr


def choose_fp32_blocks(backend, model: nn.Module, calibration: torch.Tensor, validation: Split, recipe: dict) -> dict:
    """Return `recipe` with `keep_fp32="auto"` replaced by the names of blocks to keep in FP32.

    The result also has `sensitivity`, a JSON-serializable log of the search. A recipe with any
    other `keep_fp32` is returned as it is. `calibration` is float32 (n, 3, 224, 224), normalised;
    `model` is not changed.

    The recipe's `auto` holds the budget and the sizes of the search. The budget is `sqnr_db` (at
    least, in dB), `accuracy_drop` (at most, as a share of the images: FP32 accuracy minus
    quantized), or both, which must then both be met. It is measured on `images` images of
    `validation`. The scan calibrates on `calibration_images` images, the trials on all of
    `calibration`. Each trial keeps one more block in FP32, the most damaging first.

    Raises `ValueError` for an `auto` without a budget or with unknown keys, and for logits that are
    not finite; `UserError` if the budget is not met with all blocks but one in FP32.
    """
    if recipe.get("keep_fp32") != "auto":
        return recipe
    sizes, budget = _settings(recipe.get("auto") or {})
    names, images = blocks(model), validation.sample(sizes["images"])
    reference = _logits(copy.deepcopy(model).cpu().eval(), images)
    # Evenly spaced, because splits are in the order of their files: the first images may all be of
    # one class.
    count = min(sizes["calibration_images"], len(calibration))
    few = calibration[torch.arange(count) * len(calibration) // count]
    scanned = scan(lambda keep: _predictor(backend, model, few, recipe | {"keep_fp32": keep}), names, reference, images)
    order = sorted(names, key=lambda name: _worth("sqnr_db", scanned[name]))
    log = {"scan": scanned, "order": order, "tried": [], "budget": budget, "images": len(images)}
    wanted = " and ".join(BUDGETS[key].format(limit) for key, limit in budget.items())
    with progress.Bar("choosing keep_fp32, at most", len(names), "trials") as bar:
        for k in range(len(names)):
            keep = tuple(name for name in names if name in order[:k])
            predictor = _predictor(backend, model, calibration, recipe | {"keep_fp32": keep})
            trial = _quality(_logits(predictor, images), reference, images.y)
            log["tried"].append({"keep_fp32": list(keep)} | trial)
            reached = f"{_reached(trial, budget)} on {len(images)} validation images"
            if all(_worth(key, trial[key]) >= _worth(key, limit) for key, limit in budget.items()):
                chosen = f"{', '.join(keep) or 'none'} (of {len(names)} blocks) {'meet' if k > 1 else 'meets'}"
                progress.say(f"keep_fp32: {chosen} {wanted} with {reached}")
                return recipe | {"keep_fp32": keep, "sensitivity": log}
            bar.step(note=reached)
    best = max(log["tried"], key=lambda trial: [_worth(key, trial[key]) for key in budget])
    raise UserError(
        f'keep_fp32="auto" on {backend.name}: {wanted} is not met with up to {len(names) - 1} of {len(names)} blocks in FP32; '
        f"the best is {_reached(best, budget)}, with {len(best['keep_fp32'])}.\nRelax the budget in `auto` of the recipe."
    )


def _predictor(backend, model: nn.Module, calibration: torch.Tensor, recipe: dict) -> Predictor:
    """Quantize `model` and return what answers as it will: torch's network, or the exact execution."""
    deployed = backend.quantize(model, calibration, recipe)
    return deployed.predict or (lambda x: execute(deployed.quantized, x))


def _settings(auto: dict) -> tuple[dict[str, int], dict[str, float]]:
    sizes, budget = ({key: auto[key] for key in known if key in auto} for known in (SIZES, BUDGETS))
    if not budget or None in budget.values() or len(sizes) + len(budget) < len(auto) or min(sizes.values(), default=1) < 1:
        raise ValueError(f"keep_fp32='auto' takes auto=dict() of {[*BUDGETS]} (at least one) and {[*SIZES]}, not {auto}")
    return SIZES | sizes, budget


def _logits(predictor: Predictor, split: Split) -> np.ndarray:
    logits = predict(predictor, split)
    if not np.isfinite(logits).all():  # NaN cannot be ranked
        raise ValueError("keep_fp32='auto': some validation logits are not finite, so no block can be ranked; check the weights")
    return logits


def _quality(logits: np.ndarray, reference: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    fidelity = metrics.fidelity(logits, reference)
    # From counts, because the difference of two shares is inexact: 0.9 - 0.7 > 0.2.
    lost = int((reference.argmax(1) == y).sum()) - int((logits.argmax(1) == y).sum())
    return {"sqnr_db": fidelity["sqnr_db"], "agreement": fidelity["agreement_fp32"], "accuracy_drop": lost / len(y)}


def _worth(key: str, value: float | None) -> float:
    """Turn a value into one of which more is better; None (no noise) becomes infinity."""
    return -value if key == "accuracy_drop" else math.inf if value is None else value


def _reached(trial: dict, budget: dict[str, float]) -> str:
    sqnr = "no noise" if trial["sqnr_db"] is None else f"{trial['sqnr_db']:.1f} dB"
    return " and ".join({"sqnr_db": sqnr, "accuracy_drop": f"a drop of {trial['accuracy_drop']:.4f}"}[key] for key in budget)
