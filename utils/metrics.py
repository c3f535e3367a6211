"""What a classifier's logits are worth, alone and beside the FP32 network's. Positive class: the second (dog)."""

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk

ECE_BINS = 15


def classification(logits: np.ndarray, y: np.ndarray) -> dict[str, float | int]:
    """Metrics of logits (n, 2) against labels `y` (n,), each a share or probability from 0 to 1 unless said otherwise.

    `log_loss` is in nats; `tn`, `fp`, `fn`, `tp` count images. Everything but `ece` is scikit-learn's.
    Raises `ValueError` when a logit is not finite.
    """
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise ValueError(f"{bad} of {len(logits)} images have logits that are not finite")
    probability = softmax(logits.astype(np.float64), axis=1)[:, 1]
    predicted = logits.argmax(1)
    tn, fp, fn, tp = (int(n) for n in sk.confusion_matrix(y, predicted, labels=[0, 1]).ravel())
    found = {
        "n_test": len(y),
        "accuracy": sk.accuracy_score(y, predicted),
        "precision": sk.precision_score(y, predicted, zero_division=0),
        "recall": sk.recall_score(y, predicted, zero_division=0),
        "specificity": sk.recall_score(y, predicted, pos_label=0, zero_division=0),
        "f1": sk.f1_score(y, predicted, zero_division=0),
        "balanced_accuracy": sk.balanced_accuracy_score(y, predicted),
        "roc_auc": sk.roc_auc_score(y, probability),
        "average_precision": sk.average_precision_score(y, probability),
        "log_loss": -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(y)), y].mean(),
        "brier": sk.brier_score_loss(y, probability),
        "ece": ece(np.where(predicted == 1, probability, 1 - probability), predicted == y),
    }
    counts = {"tn": tn, "fp": fp, "fn": fn, "tp": tp}
    return {name: value if isinstance(value, int) else float(value) for name, value in (found | counts).items()}


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error: the gap between confidence and accuracy, averaged over the images of equal-width bins.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 5; bins are open on the left, so a confidence on an
    edge belongs to the bin below it.
    """
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    size = np.bincount(bin_of, minlength=bins)
    gap = np.bincount(bin_of, correct, bins) - np.bincount(bin_of, confidence, bins)
    return float(np.abs(gap[size > 0]).sum() / len(confidence))


def sqnr_db(reference: np.ndarray, quantized: np.ndarray) -> float | None:
    """Signal-to-quantization-noise ratio in dB: power of `reference` over power of the difference; None without any noise."""
    reference, quantized = reference.astype(np.float64), quantized.astype(np.float64)
    noise = np.square(reference - quantized).sum()
    return None if noise == 0 else float(10 * np.log10(np.square(reference).sum() / noise))


def fidelity(logits: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """How closely logits (n, 2) follow the FP32 network's on the same images.

    `agreement_fp32`: share of images with the same decision. `logit_cosine`: mean over images of the cosine between the two
    logit vectors. `sqnr_db`: over all logits. `kl_mean`: mean KL divergence from the FP32 class probabilities, in nats.
    """
    a, b = reference.astype(np.float64), logits.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.where(norms == 0, 1, norms)
    log_a, log_b = log_softmax(a, axis=1), log_softmax(b, axis=1)
    return {
        "agreement_fp32": float((a.argmax(1) == b.argmax(1)).mean()),
        "logit_cosine": float(cosine.mean()),
        "sqnr_db": sqnr_db(a, b),
        "kl_mean": float((np.exp(log_a) * (log_a - log_b)).sum(1).mean()),
    }
