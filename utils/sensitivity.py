"""Which blocks suffer from quantization, and `keep_fp32="auto"`: the fewest of them in FP32 that meet a recipe's budget.

The idea is the layer-wise sensitivity analysis of Wu et al. 2020, "Integer Quantization for Deep Learning Inference: Principles
and Empirical Evaluation" (arXiv:2004.09602), section 5.1: quantize each layer alone, rank them, and leave the worst in floating
point. Here the unit is a block, and they are ranked by SQNR, which tells blocks apart on 100 images where accuracy does not.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from utils import metrics, progress
from utils.backends.base import Deployed, Predictor
from utils.data import Split
from utils.errors import UserError
from utils.train import EVAL_BATCH

SIZES = {"images": 100, "calibration_images": 64}  # where the recipe does not say
BUDGETS = {"sqnr_db": "sqnr_db >= {}", "accuracy_drop": "accuracy_drop <= {}"}


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks of `model` in the order of their definition, in the study's networks that of computation.

    A block is a child of the model, or of a plain `nn.Sequential` in it (however deep), with a convolution or linear layer.
    Subclasses of `nn.Sequential` are blocks, not containers. Every such layer is in exactly one block.
    """
    found = []
    for name, child in model.named_children():
        if type(child) is nn.Sequential:
            found.extend(f"{name}.{inner}" for inner in blocks(child))
        elif any(isinstance(module, nn.Conv2d | nn.Linear) for module in child.modules()):
            found.append(name)
    return tuple(found)


def scan(
    quantize: Callable[[tuple[str, ...]], Deployed], names: tuple[str, ...], reference: np.ndarray, validation: Split
) -> dict[str, float | None]:
    """SQNR in dB (None: no noise) of the logits on `validation` with one block quantized, the others in FP32; for each block.

    `quantize(keep)` gives the network with the blocks `keep` in FP32; `reference` are the FP32 network's logits, float32
    (len(validation), 2). Raises `ValueError` when a logit is not finite.
    """
    found = {}
    with progress.Bar("sensitivity scan", len(names), "blocks") as bar:
        for name in names:
            deployed = quantize(tuple(other for other in names if other != name))
            found[name] = metrics.sqnr_db(reference, _logits(deployed.predict, validation))
            bar.step(note=name)
    return found


def resolve(backend, model: nn.Module, calibration: torch.Tensor, validation: Split, recipe: dict) -> dict:
    """`recipe` with the names that `keep_fp32="auto"` stands for, and with `sensitivity`, a JSON-able log of how they were found.

    A recipe with any other `keep_fp32` comes back as it is. `calibration`: float32 (n, 3, 224, 224), normalised. The
    recipe's `auto` is the budget, all of which must be met: `sqnr_db` (dB, at least), `accuracy_drop` (share of images, at
    most; FP32 accuracy minus quantized), both on `images` of `validation`. The scan calibrates on `calibration_images`, the
    trials on all. The most damaging blocks are kept first, one more in each trial. `model` is not changed.
    Raises `ValueError` for an `auto` without budget or with unknown keys, and for logits that are not finite; `UserError` when
    the budget is not met with all blocks but one in FP32.
    """
    if recipe.get("keep_fp32") != "auto":
        return recipe
    sizes, budget = _settings(recipe.get("auto") or {})
    names, images = blocks(model), validation.sample(sizes["images"])
    reference = _logits(copy.deepcopy(model).cpu().eval(), images)
    # Spread out, because splits lie in the order of their files: the first images may all be of one class.
    count = min(sizes["calibration_images"], len(calibration))
    few = calibration[torch.arange(count) * len(calibration) // count]
    scanned = scan(lambda keep: backend.quantize(model, few, recipe | {"keep_fp32": keep}), names, reference, images)
    order = sorted(names, key=lambda name: _worth("sqnr_db", scanned[name]))
    log = {"scan": scanned, "order": order, "tried": [], "budget": budget, "images": len(images)}
    wanted = " and ".join(BUDGETS[key].format(limit) for key, limit in budget.items())
    with progress.Bar("choosing keep_fp32, at most", len(names), "trials") as bar:
        for k in range(len(names)):
            keep = tuple(name for name in names if name in order[:k])
            deployed = backend.quantize(model, calibration, recipe | {"keep_fp32": keep})
            trial = _quality(_logits(deployed.predict, images), reference, images.y)
            log["tried"].append({"keep_fp32": list(keep)} | trial)
            reached = f"{_reached(trial, budget)} on {len(images)} validation images"
            if all(_worth(key, trial[key]) >= _worth(key, limit) for key, limit in budget.items()):
                chosen = f"{', '.join(keep) or 'none'} (of {len(names)} blocks) {'meet' if k > 1 else 'meets'}"
                progress.say(f"keep_fp32: {chosen} {wanted} with {reached}")
                return recipe | {"keep_fp32": keep, "sensitivity": log}
            bar.step(note=reached)
    best = max(log["tried"], key=lambda own: [_worth(key, own[key]) for key in budget])
    raise UserError(
        f'keep_fp32="auto" on {backend.name}: {wanted} is not met with {len(names) - 1} of {len(names)} blocks in FP32 or fewer; '
        f"the best is {_reached(best, budget)}, with {len(best['keep_fp32'])}.\nAsk for less in `auto` of the recipe."
    )


def _settings(auto: dict) -> tuple[dict[str, int], dict[str, float]]:
    sizes, budget = ({key: auto[key] for key in known if key in auto} for known in (SIZES, BUDGETS))
    if not budget or None in budget.values() or len(sizes) + len(budget) < len(auto) or min(sizes.values(), default=1) < 1:
        raise ValueError(f"keep_fp32='auto' takes auto=dict() of {[*BUDGETS]} (at least one) and {[*SIZES]}, not {auto}")
    return SIZES | sizes, budget


@torch.inference_mode()
def _logits(predictor: Predictor, split: Split) -> np.ndarray:
    logits = np.concatenate([predictor(x).float().cpu().numpy() for x, _ in split.batches(EVAL_BATCH)])
    if not np.isfinite(logits).all():  # NaN would have no place in the ranking
        raise ValueError("there are logits that are not finite")
    return logits


def _quality(logits: np.ndarray, reference: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    found = metrics.fidelity(logits, reference)
    # Counted, not a difference of two shares: 0.9 - 0.7 is more than 0.2.
    lost = int((reference.argmax(1) == y).sum()) - int((logits.argmax(1) == y).sum())
    return {"sqnr_db": found["sqnr_db"], "agreement": found["agreement_fp32"], "accuracy_drop": lost / len(y)}


def _worth(key: str, value: float | None) -> float:
    """More is better."""
    return -value if key == "accuracy_drop" else math.inf if value is None else value


def _reached(trial: dict, budget: dict[str, float]) -> str:
    sqnr = "no noise" if trial["sqnr_db"] is None else f"{trial['sqnr_db']:.1f} dB"
    return " and ".join({"sqnr_db": sqnr, "accuracy_drop": f"a drop of {trial['accuracy_drop']:.4f}"}[key] for key in budget)
