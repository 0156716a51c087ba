"""Weights of labels against scikit-learn's, and the temperature against a grid of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from components.training.classifier import class_weights, fit_temperature


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.random.default_rng(0).choice(5, 400, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    balanced = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert class_weights(labels, 5, 1.0) == pytest.approx(balanced)
    assert class_weights(labels, 5, 0.0).tolist() == [1.0] * 5
    assert class_weights(labels, 5, 0.5) == pytest.approx(np.sqrt(balanced))


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_no_other_temperature_has_a_lower_loss(sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(logits * sharpness, labels)
    grid = np.exp(np.linspace(-2, 2, 401))
    losses = [float(F.cross_entropy(logits * sharpness / value, labels)) for value in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.011)
    assert fit_temperature(logits[:0], labels[:0]) == 1.0
