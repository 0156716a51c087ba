"""How far a classifier's probabilities can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 15
"""As in Guo et al. 2017."""


@dataclass(frozen=True)
class Bin:
    """Guesses of about the same probability."""

    texts: int
    confidence: float
    """Mean probability of what was guessed."""
    accuracy: float
    """Share of it that is right."""


def reliability(confidences: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> list[Bin]:
    """Guesses by their probability in `BINS` equal steps, (0, 1/15], (1/15, 2/15], ...; empty ones left out."""
    place = np.clip(np.ceil(confidences * BINS).astype(int) - 1, 0, BINS - 1)
    marks = (place == number for number in range(BINS))
    return [
        Bin(int(here.sum()), float(confidences[here].mean()), float(right[here].mean())) for here in marks if here.any()
    ]


def expected_calibration_error(confidences: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    """Guo et al. 2017 (arXiv 1706.04599), eq. 3: the mean over texts of |accuracy - confidence| of their bin."""
    bins = reliability(confidences, right)
    return sum(one.texts * abs(one.accuracy - one.confidence) for one in bins) / max(1, len(right))
