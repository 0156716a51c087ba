"""Scores and weights of labels against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

from components.evaluation.label_metrics import class_weights, confusion_matrix, f1_scores, macro_f1, numbered

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.choice(6, 400, p=[0.5, 0.2, 0.15, 0.1, 0.05, 0.0])
GUESSES = np.where(RANDOM.random(400) < 0.6, LABELS, RANDOM.integers(0, 5, 400))


def test_scores_are_those_of_scikit_learn() -> None:
    confusion = confusion_matrix(LABELS, GUESSES, 6)
    assert confusion.tolist() == metrics.confusion_matrix(LABELS, GUESSES, labels=range(6)).tolist()
    assert f1_scores(confusion)[:5] == pytest.approx(metrics.f1_score(LABELS, GUESSES, average=None))
    assert np.isnan(f1_scores(confusion)[5])
    assert macro_f1(LABELS, GUESSES, 6) == pytest.approx(metrics.f1_score(LABELS, GUESSES, average="macro"))


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = LABELS[LABELS < 5]
    balanced = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert class_weights(labels, 5, 1.0) == pytest.approx(balanced)
    assert class_weights(labels, 5, 0.0).tolist() == [1.0] * 5
    assert class_weights(labels, 5, 0.5) == pytest.approx(np.sqrt(balanced))


def test_labels_have_the_numbers_of_their_names() -> None:
    assert numbered(["b", "a", "x"], ["a", "b"]).tolist() == [1, 0, -1]
