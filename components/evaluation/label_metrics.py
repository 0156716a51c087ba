"""Labels of texts: which there are, how often, and how well they are guessed.

L labels, N texts. Scores are scikit-learn's (a test holds them to it), of which training and serving need not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def class_weights(numbers: Numbers, count: int, power: float) -> Floats:
    """The weight (L,) of each label in the loss: (N / (L n)) ** power for one that n of the N texts have.

    Power 1 weighs all labels alike however rare ("balanced" in scikit-learn), power 0 all texts alike.
    """
    found = np.bincount(numbers, minlength=count)
    weights: Floats = (len(numbers) / (count * np.maximum(found, 1))) ** power
    return weights


def confusion_matrix(labels: Numbers, guesses: Numbers, count: int) -> Numbers:
    """How many texts of each label (row) were taken for each (column): (L, L)."""
    counted = np.bincount(labels * count + guesses, minlength=count * count)
    return counted.astype(np.int64).reshape(count, count)


def f1_scores(confusion: Numbers) -> Floats:
    """F1 of each label (L,): 2 right / (texts that have it + guesses of it); NaN where there are neither."""
    right = np.diag(confusion).astype(float)
    total = confusion.sum(0) + confusion.sum(1)
    scores: Floats = np.divide(2 * right, total, out=np.full(len(right), np.nan), where=total > 0)
    return scores


def macro_f1(labels: Numbers, guesses: Numbers, count: int) -> float:
    """The mean F1 of the labels that occur, among texts or guesses."""
    scores = f1_scores(confusion_matrix(labels, guesses, count))
    return float(np.nanmean(scores)) if len(labels) else 0.0


def numbered(texts_labels: Sequence[str], names: Sequence[str]) -> Numbers:
    """The place of each label among the names (N,); -1 for one that is not there."""
    places = {name: number for number, name in enumerate(names)}
    return np.array([places.get(label, -1) for label in texts_labels], np.int64)
