"""Scores and weights of labels against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

from components.data.labels import class_weights, confusion_matrix, f1_scores, macro_f1, numbered, stratified

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


def test_a_share_of_each_label_is_set_aside() -> None:
    chosen = stratified(LABELS, 0.1, seed=0)
    for label in range(5):
        assert chosen[LABELS == label].sum() == max(1, round(0.1 * (LABELS == label).sum()))
    assert (stratified(LABELS, 0.1, seed=0) == chosen).all()
    assert (stratified(LABELS, 0.1, seed=1) != chosen).any()


def test_the_only_text_of_a_label_is_learned_from() -> None:
    chosen = stratified(np.array([0, 0, 0, 0, 1, 2, 2]), 0.9, seed=0)
    assert not chosen[4]
    assert (chosen[:4].sum(), chosen[5:].sum()) == (3, 1)


def test_labels_have_the_numbers_of_their_names() -> None:
    assert numbered(["b", "a", "x"], ["a", "b"]).tolist() == [1, 0, -1]
