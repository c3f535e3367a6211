"""`utils.metrics` against values worked out by hand, scikit-learn and scipy."""

import warnings

import numpy as np
import pytest
from scipy.special import rel_entr, softmax
from sklearn import metrics as sk

from utils import metrics

RANDOM = np.random.default_rng(0)
Y = RANDOM.integers(0, 2, 200)
LOGITS = (RANDOM.normal(size=(200, 2)) + np.stack([-Y, Y], 1)).astype(np.float32)


def logits_for(probabilities):
    """Logits whose softmax gives the second class these probabilities."""
    p = np.asarray(probabilities)
    return np.log(np.stack([1 - p, p], 1))


def test_six_images_by_hand():
    y = np.array([0, 0, 0, 1, 1, 1])
    p = np.array([0.1, 0.4, 0.7, 0.2, 0.6, 0.9])  # decisions 0 0 1 0 1 1
    scores = metrics.classification(logits_for(p), y)
    assert {name: scores[name] for name in ("n_test", "tn", "fp", "fn", "tp")} == dict(
        n_test=6, tn=2, fp=1, fn=1, tp=2
    )
    for name in ("accuracy", "precision", "recall", "specificity", "f1", "balanced_accuracy"):
        assert scores[name] == pytest.approx(2 / 3), name
    # The dog is ahead in six of the nine pairs (dog, cat): not in (0.2, 0.4), (0.2, 0.7) and
    # (0.6, 0.7).
    assert scores["roc_auc"] == pytest.approx(6 / 9)
    # Precision at each dog from the top: 1/1 (0.9), 2/3 (0.6), 3/5 (0.2).
    assert scores["average_precision"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert scores["log_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.3, 0.2, 0.6, 0.9]).mean())
    assert scores["brier"] == pytest.approx(np.mean([0.01, 0.16, 0.49, 0.64, 0.16, 0.01]))


def test_cats_and_dogs_are_not_mixed_up():
    # One dog of three and three cats of four are recognized: mirror images have other values.
    scores = metrics.classification(
        logits_for([0.9, 0.1, 0.2, 0.3, 0.4, 0.1, 0.8]), np.array([1, 1, 1, 0, 0, 0, 0])
    )
    assert (scores["tp"], scores["fn"], scores["tn"], scores["fp"]) == (1, 2, 3, 1)
    assert (scores["precision"], scores["recall"], scores["specificity"]) == pytest.approx(
        (1 / 2, 1 / 3, 3 / 4)
    )
    assert (scores["f1"], scores["balanced_accuracy"]) == pytest.approx((2 / 5, 13 / 24))


def test_random_logits_against_scikit_learn():
    p, predicted = softmax(LOGITS.astype(np.float64), axis=1)[:, 1], LOGITS[:, 1] > LOGITS[:, 0]
    expected = {
        "accuracy": sk.accuracy_score(Y, predicted),
        "precision": sk.precision_score(Y, predicted),
        "recall": sk.recall_score(Y, predicted),
        "specificity": sk.recall_score(1 - Y, ~predicted),
        "f1": sk.f1_score(Y, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(Y, predicted),
        "roc_auc": sk.roc_auc_score(Y, p),
        "average_precision": sk.average_precision_score(Y, p),
        "log_loss": sk.log_loss(Y, p),
        "brier": sk.brier_score_loss(Y, p),
    }
    scores = metrics.classification(LOGITS, Y)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    # JSON cannot hold NumPy numbers.
    assert all(type(value) in (int, float) for value in scores.values())


@pytest.mark.parametrize("decision", [0, 1])
def test_one_class_for_all_images_gives_zeros_and_no_warnings(decision):
    y = np.array([0, 1, 1, 1])
    logits = np.zeros((4, 2), np.float32)
    logits[:, decision] = [1, 2, 3, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metrics.classification(logits, y)
    assert (scores["recall"], scores["specificity"]) == (decision, 1 - decision)
    assert scores["precision"] == (0.75 if decision else 0)
    assert scores["f1"] == pytest.approx(2 * 0.75 / 1.75 if decision else 0)
    assert (scores["balanced_accuracy"], scores["accuracy"]) == (0.5, 0.75 if decision else 0.25)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_and_counted(bad):
    logits = LOGITS.copy()
    logits[[3, 5], 0] = bad
    logits[5, 1] = bad
    with pytest.raises(ValueError, match="2 of 200 images"):
        metrics.classification(logits, Y)


def test_logits_far_apart_stay_finite():
    scores = metrics.classification(
        np.array([[1000, -1000], [1000, -1000], [-1000, 1000]], np.float32), np.array([0, 1, 1])
    )
    assert scores["log_loss"] == pytest.approx(2000 / 3)


# ---- expected calibration error


def test_ece_by_hand_with_a_confidence_on_an_edge():
    confidence = np.array([0.75, 0.6, 0.9, 1.0, 0.8])
    correct = np.array([False, True, True, True, False])
    # Four bins. (0.5, 0.75] holds 0.75 and 0.6: one correct, 1.35 expected. (0.75, 1]: two correct,
    # 2.7 expected.
    assert metrics.ece(confidence, correct, bins=4) == pytest.approx((0.35 + 0.7) / 5)


def test_ece_takes_a_confidence_of_zero_into_the_lowest_bin():
    assert metrics.ece(np.array([0.0, 0.1]), np.array([True, False]), bins=4) == pytest.approx(
        0.9 / 2
    )


def test_ece_has_fifteen_bins():
    # 0.91 and 0.95 share one of ten bins, but 14/15 = 0.933 lies between them, so the two gaps do
    # not cancel.
    assert metrics.ece(np.array([0.91, 0.95]), np.array([True, False])) == pytest.approx(
        (0.09 + 0.95) / 2
    )
    # 0.94 and 0.99 share one of fifteen and would not share one of twenty.
    assert metrics.ece(np.array([0.94, 0.99]), np.array([True, False])) == pytest.approx(0.93 / 2)


def test_ece_of_a_classifier_is_about_its_decisions():
    # Decisions 0, 0, 1, 1 with confidences 0.9, 0.7, 0.8, 0.6; the second and the last are wrong.
    # No two of them share a bin.
    scores = metrics.classification(logits_for([0.1, 0.3, 0.8, 0.6]), np.array([0, 1, 1, 0]))
    assert scores["ece"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.6) / 4)


# ---- fidelity to the FP32 network


def test_sqnr_by_hand():
    signal, quantized = np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]])
    assert metrics.sqnr_db(signal, quantized) == pytest.approx(20)  # 25 / 0.25 = 100
    assert metrics.sqnr_db(10 * signal, 10 * quantized) == pytest.approx(20)
    assert metrics.sqnr_db(signal, signal) is None


def test_sqnr_measures_against_the_signal():
    assert metrics.sqnr_db(np.array([1.0]), np.array([3.0])) == pytest.approx(10 * np.log10(1 / 4))
    assert metrics.sqnr_db(np.array([3.0]), np.array([1.0])) == pytest.approx(10 * np.log10(9 / 4))


def test_sqnr_of_float32_is_computed_in_float64():
    signal = np.array([1e30, 1.0], np.float32)  # its square overflows float32
    assert metrics.sqnr_db(signal, np.array([0, 1], np.float32)) == pytest.approx(0)


def test_fidelity_by_hand():
    fp32 = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [0.0, 0.5]])
    logits = np.array([[2.0, 0.0], [2.0, 0.0], [4.0, 3.0], [0.0, 0.5]])
    scores = metrics.fidelity(logits, fp32)
    assert scores["agreement_fp32"] == 0.5
    assert scores["logit_cosine"] == pytest.approx((1 + 0 + 24 / 25 + 1) / 4)
    assert scores["sqnr_db"] == pytest.approx(10 * np.log10((1 + 4 + 25 + 0.25) / (1 + 8 + 2)))


def test_kl_is_from_fp32_as_scipy_computes_it():
    quantized = LOGITS + RANDOM.normal(scale=0.5, size=LOGITS.shape)
    p, q = softmax(LOGITS.astype(np.float64), axis=1), softmax(quantized, axis=1)
    scores = metrics.fidelity(quantized, LOGITS)["kl_mean"]
    assert scores == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-9)
    assert scores != pytest.approx(rel_entr(q, p).sum(1).mean(), rel=1e-3)


def test_a_network_agrees_with_itself():
    scores = metrics.fidelity(LOGITS, LOGITS)
    assert scores == pytest.approx(
        {"agreement_fp32": 1, "logit_cosine": 1, "sqnr_db": None, "kl_mean": 0}, abs=1e-12
    )


def test_logits_of_zeros_have_a_cosine():
    assert metrics.fidelity(np.zeros((1, 2)), np.ones((1, 2)))["logit_cosine"] == 0
