"""A classifier in pictures: what it takes for what, how far it can be believed, and how it does label by label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from components.evaluation.calibration import expected_calibration_error, reliability

READABLE = 40
"""Labels up to which each is named beside the matrix."""
MAX_INCHES = 300
"""Height of a figure; matplotlib refuses 2^16 pixels and more."""


def draw_confusion(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> Any:
    """The share of each label's texts that were taken for each label."""
    from matplotlib.figure import Figure

    side = 4 + 0.25 * min(len(names), READABLE)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="Blues"), shrink=0.7, label="share of the label's texts")
    if len(names) <= READABLE:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    return figure


def draw_reliability(confidences: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> Any:
    """The share of right guesses against the probability they were given; on the diagonal, it can be believed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    bins = reliability(confidences, right)
    axes.plot([0, 1], [0, 1], color="#999999", linestyle="--")
    axes.plot([one.confidence for one in bins], [one.accuracy for one in bins], marker="o", color="#4477aa")
    axes.set_title(f"expected calibration error {expected_calibration_error(confidences, right):.3f}")
    axes.set_xlabel("probability of the guess")
    axes.set_ylabel("share that is right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure


def draw_f1(labels: Mapping[str, Mapping[str, Any]]) -> Any:
    """F1 of each label, beside the baseline's."""
    from matplotlib.figure import Figure

    shown = {name: one for name, one in reversed(list(labels.items())) if one["f1"] is not None}
    figure = Figure(figsize=(8, min(0.35 * len(shown) + 1.2, MAX_INCHES)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    axes.barh(places + 0.2, [one["f1"] for one in shown.values()], 0.4, label="classifier", color="#4477aa")
    axes.barh(
        places - 0.2, [one["baseline_f1"] or 0.0 for one in shown.values()], 0.4, label="baseline", color="#bbbbbb"
    )
    axes.set_yticks(places, list(shown), fontsize=7, parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1")
    axes.legend(loc="lower right")
    return figure
