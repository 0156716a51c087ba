"""Whether people ask, and judge, otherwise than before: population stability index and Fisher's exact test.

A measure alarms when it is both large and no accident: an index above 0.2 is called a shift by convention,
and small samples exceed it by chance, so it must also exceed what samples of that size from the reference give.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import fisher_exact

PSI_THRESHOLD = 0.2
FALSE_ALARM_RATE = 0.001
"""Of each measure and each look, when nothing changed."""
_DRAWS = 4000
_WORDS = 30
"""Most frequent words of the reference that have a bin of their own."""
_LENGTH_EDGES = (2, 4, 6, 8, 11, 15, 25)
"""Upper bounds of the bins of prompt lengths, in words."""


@dataclass(frozen=True)
class Measure:
    """One comparison with the past."""

    name: str
    value: float
    threshold: float
    samples: int
    drifted: bool


def psi(reference: Sequence[int], current: Sequence[int]) -> float:
    """Population stability index of two histograms; half a count is added to each bin."""
    return float(_psi(np.asarray(reference, float), np.asarray(current, float)))


def compare(name: str, reference: Sequence[int], current: Sequence[int], seed: int = 0) -> Measure:
    """Hold a histogram against that of the reference."""
    known, seen = np.asarray(reference, float), np.asarray(current, int)
    total = int(seen.sum())
    shares = (known + 0.5) / (known + 0.5).sum()
    draws = np.random.default_rng(seed).multinomial(total, shares, size=_DRAWS)
    chance = float(np.quantile(_psi(known, draws.astype(float)), 1 - FALSE_ALARM_RATE))
    value, threshold = psi(reference, current), max(PSI_THRESHOLD, chance)
    return Measure(name, value, threshold, total, bool(total) and value > threshold)


def rating_change(past: tuple[int, int], now: tuple[int, int]) -> Measure:
    """Two-sided p value of Fisher's exact test on (up, down) votes; small is a change."""
    value = float(fisher_exact([past, now]).pvalue)
    return Measure("rating (p value)", value, FALSE_ALARM_RATE, sum(now), value < FALSE_ALARM_RATE)


def lengths(prompts: Iterable[str]) -> list[int]:
    """Histogram of the prompts' lengths."""
    bins = [0] * (len(_LENGTH_EDGES) + 1)
    for prompt in prompts:
        bins[int(np.searchsorted(_LENGTH_EDGES, len(prompt.split())))] += 1
    return bins


def first_words(reference: Sequence[str], current: Sequence[str]) -> tuple[list[int], list[int]]:
    """Histograms of the words that prompts begin with: one a prompt, so that the counts are independent."""
    known, seen = Counter(map(_first, reference)), Counter(map(_first, current))
    words = [word for word, _ in known.most_common(_WORDS)]
    return _binned(known, words), _binned(seen, words)


def _binned(counts: Counter[str], words: Sequence[str]) -> list[int]:
    inside = [counts[word] for word in words]
    return [*inside, sum(counts.values()) - sum(inside)]


def _first(prompt: str) -> str:
    found = re.search(r"\w+", prompt.lower())
    return found.group() if found else ""


def _psi(reference: np.ndarray, current: np.ndarray) -> np.ndarray:
    known = (reference + 0.5) / (reference + 0.5).sum()
    seen = (current + 0.5) / (current + 0.5).sum(axis=-1, keepdims=True)
    return np.asarray(((seen - known) * np.log(seen / known)).sum(axis=-1))
