"""Metrics of a classifier's logits, alone and against FP32. Label 1 is the positive class."""

import numpy as np
from scipy.special import log_softmax, softmax

ECE_BINS = 15


def classification(logits: np.ndarray, y: np.ndarray) -> dict[str, float | int]:
    """Compute the metrics of logits (n, 2) against labels `y` (n,) of 0 and 1.

    `n_test`, `tn`, `fp`, `fn` and `tp` count images, `log_loss` is in nats, and all others range
    from 0 to 1. Every metric except `ece` is defined as in scikit-learn, with label 1 as the
    positive class. Raises `ValueError` if a logit is not finite.
    """
    # Not at the top: it takes 1 s, also in processes that only run a network.
    from sklearn import metrics as sk

    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise ValueError(f"{bad} of {len(logits)} images have logits that are not finite")
    probability = softmax(logits.astype(np.float64), axis=1)[:, 1]
    predicted = logits.argmax(1)
    tn, fp, fn, tp = (int(n) for n in sk.confusion_matrix(y, predicted, labels=[0, 1]).ravel())
    scores = {
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
    return {name: _plain(value) for name, value in (scores | counts).items()}


def _plain(value: float | int) -> float | int:
    """Convert a NumPy float to a Python float, which JSON can hold."""
    return value if isinstance(value, int) else float(value)


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error, from 0 to 1, of `confidence` (n,) against `correct` (n,).

    This is the gap between mean confidence and accuracy in each of `bins` equal-width bins,
    averaged over the images (Guo et al. 2017, "On Calibration of Modern Neural Networks",
    equation 5). Bins are open on the left, so a confidence on an edge belongs to the lower bin.
    """
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    size = np.bincount(bin_of, minlength=bins)
    gap = np.bincount(bin_of, correct, bins) - np.bincount(bin_of, confidence, bins)
    return float(np.abs(gap[size > 0]).sum() / len(confidence))


def sqnr_db(signal: np.ndarray, quantized: np.ndarray) -> float | None:
    """Signal-to-quantization-noise ratio in dB; None if both arrays are equal.

    This is the power of `signal` over the power of the difference between `signal` and `quantized`.
    """
    signal = signal.astype(np.float64)
    difference = signal - quantized
    # For AlexNet's largest layer, vdot takes 0.25 s; squares and their sum take 1.5 s.
    noise = np.vdot(difference, difference)
    return None if noise == 0 else float(10 * np.log10(np.vdot(signal, signal) / noise))


def fidelity(logits: np.ndarray, fp32: np.ndarray) -> dict[str, float | None]:
    """Compare logits (n, 2) with the logits `fp32` of the FP32 network on the same images.

    `agreement_fp32` is the share of images with the same decision. `logit_cosine` is the cosine
    between the two logit vectors, averaged over images. `sqnr_db` covers all logits. `kl_mean` is
    the KL divergence from the FP32 class probabilities in nats, averaged over images.
    """
    a, b = fp32.astype(np.float64), logits.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.where(norms == 0, 1, norms)
    log_a, log_b = log_softmax(a, axis=1), log_softmax(b, axis=1)
    return {
        "agreement_fp32": float((a.argmax(1) == b.argmax(1)).mean()),
        "logit_cosine": float(cosine.mean()),
        "sqnr_db": sqnr_db(a, b),
        "kl_mean": float((np.exp(log_a) * (log_a - log_b)).sum(1).mean()),
    }
