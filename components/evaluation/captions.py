"""Captions against their references: CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) and BLEU as sacrebleu computes it.

CIDEr-D compares TF-IDF vectors of runs of 1 to 4 words, so that what every caption says counts for little.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CAPTION_WORDS = 4
"""Words of a suite's answers, on average, from which on they are captions."""
NGRAMS = (1, 2, 3, 4)
SIGMA = 6.0
"""Words: standard deviation of the Gaussian penalty on the difference in length."""
SCALE = 10.0
Ngram = tuple[str, ...]
Vector = dict[Ngram, float]


def are_captions(answers: Sequence[str]) -> bool:
    """Whether the right answers about pictures are captions, which may be told in other words."""
    return sum(len(answer.split()) for answer in answers) >= CAPTION_WORDS * len(answers)


@dataclass(frozen=True)
class CaptionScores:
    """Captions against their references."""

    cider_d: float
    """From 0 to 10; mean over captions."""
    bleu: float
    """From 0 to 1; of runs of up to four words over all captions together (Papineni et al. 2002)."""
    each: tuple[float, ...]
    """CIDEr-D of each caption, in order: what a paired test compares."""


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """CIDEr-D and BLEU of each caption with its references, of which there may be several.

    Raises: ValueError when there are not as many of one as of the other, or none, or a caption has no reference.
    """
    from sacrebleu.metrics import BLEU

    each = cider_d(captions, references)
    most = max(map(len, references))
    # sacrebleu takes the first reference of all captions, then the second, with None where a caption has fewer.
    columns = [[own[number] if number < len(own) else None for own in references] for number in range(most)]
    bleu = BLEU(lowercase=True).corpus_score(list(captions), columns).score / 100
    return CaptionScores(sum(each) / len(each), bleu, tuple(each))


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, in order, from 0 to 10; document frequencies are those of the references.

    All are 0 where there is one caption: a word in every reference weighs nothing.

    Raises: ValueError when there are not as many of one as of the other, or none, or a caption has no reference.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError(
            f"captions: {len(captions)} with {len(references)} lists of references; give as many of each, at least one,"
            " and at least one reference for each caption"
        )
    counted = [[_ngrams(reference) for reference in own] for own in references]
    frequencies = Counter(ngram for own in counted for ngram in set().union(*own))
    weights = {ngram: math.log(len(references)) - math.log(count) for ngram, count in frequencies.items()}
    unseen = math.log(len(references))
    return [
        sum(_similarity(_ngrams(caption), own, weights, unseen) for own in refs) * SCALE / len(refs)
        for caption, refs in zip(captions, counted, strict=True)
    ]


def _similarity(
    caption: Counter[Ngram], reference: Counter[Ngram], weights: Mapping[Ngram, float], unseen: float
) -> float:
    """Equations 4 and 5 for one reference: the mean over lengths of n-grams of the clipped cosine, penalized."""
    difference = _words(caption) - _words(reference)
    total = 0.0
    for length in NGRAMS:
        own, other = (_vector(counts, length, weights, unseen) for counts in (caption, reference))
        norms = math.hypot(*own.values()) * math.hypot(*other.values())
        if norms:
            # Clipped: a caption gains nothing by repeating a reference's word.
            total += (
                sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other) / norms
            )
    return total / len(NGRAMS) * math.exp(-(difference**2) / (2 * SIGMA**2))


def _vector(counts: Counter[Ngram], length: int, weights: Mapping[Ngram, float], unseen: float) -> Vector:
    return {ngram: count * weights.get(ngram, unseen) for ngram, count in counts.items() if len(ngram) == length}


def _words(counts: Counter[Ngram]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _ngrams(text: str) -> Counter[Ngram]:
    """Counts of all runs of words, lower-cased and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return Counter(
        tuple(words[start : start + length]) for length in NGRAMS for start in range(len(words) - length + 1)
    )
