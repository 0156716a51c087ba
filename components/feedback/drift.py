"""Drift of prompts and ratings: population stability index (PSI) and Fisher's exact test.

A PSI above 0.2 is a shift by convention. Small samples exceed it by chance, so it also has to exceed the quantile of
samples of the same size from the reference.
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
"""False positive rate of each measure and comparison."""
_DRAWS = 4000
_WORDS = 30
"""Most frequent words of the reference, each with its own bin."""
_LENGTH_EDGES = (2, 4, 6, 8, 11, 15, 25)
"""Upper bounds of the bins of prompt lengths, in words."""


@dataclass(frozen=True)
class Measure:
    """One comparison of current data with the reference."""

    name: str
    value: float
    threshold: float
    samples: int
    drifted: bool


def psi(reference: Sequence[int], current: Sequence[int]) -> float:
    """Population stability index of two histograms, with half a count added to each bin."""
    return float(_psi(np.asarray(reference, float), np.asarray(current, float)))


def compare(name: str, reference: Sequence[int], current: Sequence[int], seed: int = 0) -> Measure:
    known, seen = np.asarray(reference, float), np.asarray(current, int)
    total = int(seen.sum())
    shares = (known + 0.5) / (known + 0.5).sum()
    draws = np.random.default_rng(seed).multinomial(total, shares, size=_DRAWS)
    chance = float(np.quantile(_psi(known, draws.astype(float)), 1 - FALSE_ALARM_RATE))
    value, threshold = psi(reference, current), max(PSI_THRESHOLD, chance)
    return Measure(name, value, threshold, total, bool(total) and value > threshold)


def rating_change(past: tuple[int, int], now: tuple[int, int]) -> Measure:
    """Two-sided p value of Fisher's exact test on (up, down) votes; a small one is drift."""
    value = float(fisher_exact([past, now]).pvalue)
    return Measure("rating (p value)", value, FALSE_ALARM_RATE, sum(now), value < FALSE_ALARM_RATE)


def lengths(prompts: Iterable[str]) -> list[int]:
    """Histogram of the prompts' lengths."""
    bins = [0] * (len(_LENGTH_EDGES) + 1)
    for prompt in prompts:
        bins[int(np.searchsorted(_LENGTH_EDGES, len(prompt.split())))] += 1
    return bins


def first_words(reference: Sequence[str], current: Sequence[str]) -> tuple[list[int], list[int]]:
    """Histograms of the prompts' first words: one word per prompt, so that counts are independent."""
    known, seen = Counter(map(_first, reference)), Counter(map(_first, current))
    words = [word for word, _ in known.most_common(_WORDS)]
    return _binned(known, words), _binned(seen, words)


def _binned(counts: Counter[str], words: Sequence[str]) -> list[int]:
    bins = [counts[word] for word in words]
    return [*bins, sum(counts.values()) - sum(bins)]


def _first(prompt: str) -> str:
    word = re.search(r"\w+", prompt.lower())
    return word.group() if word else ""


def _psi(reference: np.ndarray, current: np.ndarray) -> np.ndarray:
    known = (reference + 0.5) / (reference + 0.5).sum()
    seen = (current + 0.5) / (current + 0.5).sum(axis=-1, keepdims=True)
    return np.asarray(((seen - known) * np.log(seen / known)).sum(axis=-1))
