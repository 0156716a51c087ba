"""Documents as pairs of passages, as BERT is pretrained on them (arXiv 1810.04805, section 3.1 and appendix A.2).

Half of the passages B follow A, the others come from another document; the sentences that would have followed are
then the beginning of a later pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

REMEMBERED = 512
"""Documents whose sentences may be drawn from."""
SHORT_SHARE = 0.1
"""Of the pairs, those that are made shorter than a row, for what is read later is short too (appendix A.2)."""
MIN_TOKENS = 8
"""Of a passage that is worth a pair."""
_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=\S)|\n+")

Sentence = list[tuple[int, int]]
"""(id, whether it starts a word) of each token."""


@dataclass(frozen=True)
class Pair:
    """Two passages, the second empty where a document is too short to be parted."""

    first: Sentence
    second: Sentence
    random: bool
    """Whether the second is of another document."""


def sentences(text: str) -> list[str]:
    """The text in pieces that end where sentences, or lines, do."""
    return [piece for piece in _SENTENCE.split(text) if piece.strip()]


def pairs(documents: Iterable[list[Sentence]], tokens: int, random: np.random.Generator) -> Iterator[Pair]:
    """Pairs of at most `tokens` tokens together, document by document; a pair that would be longer is cut."""
    remembered: list[list[Sentence]] = []
    for document in documents:
        left = [sentence for sentence in document if sentence]
        while left:
            pair, used = _pair(left, remembered, _target(tokens, random), random)
            yield _cut(pair, tokens)
            left = left[used:]
        if len(remembered) < REMEMBERED:
            remembered.append(document)
        else:
            remembered[int(random.integers(REMEMBERED))] = document


def _target(tokens: int, random: np.random.Generator) -> int:
    short = random.random() < SHORT_SHARE and tokens > 2 * MIN_TOKENS
    return int(random.integers(2 * MIN_TOKENS, tokens + 1)) if short else tokens


def _pair(
    left: list[Sentence], remembered: list[list[Sentence]], target: int, random: np.random.Generator
) -> tuple[Pair, int]:
    """The next pair of a document, and how many of its sentences it has used."""
    taken = _fitting(left, target)
    if taken == 1:
        if len(left[0]) < 2 * MIN_TOKENS:
            return Pair(left[0], [], False), 1
        # One long sentence is parted within.
        half = min(len(left[0]), target) // 2
        if remembered and random.random() < 0.5:
            return Pair(left[0][:half], _passage(remembered, target - half, random), True), 1
        return Pair(left[0][:half], left[0][half:], False), 1
    cut = int(random.integers(1, taken))
    first = [token for sentence in left[:cut] for token in sentence]
    if remembered and random.random() < 0.5:
        return Pair(first, _passage(remembered, target - len(first), random), True), cut
    return Pair(first, [token for sentence in left[cut:taken] for token in sentence], False), taken


def _fitting(left: list[Sentence], target: int) -> int:
    """How many sentences fill a pair: the one that goes over is the last."""
    length = 0
    for count, sentence in enumerate(left, 1):
        length += len(sentence)
        if length >= target:
            return count
    return len(left)


def _passage(remembered: list[list[Sentence]], length: int, random: np.random.Generator) -> Sentence:
    """About so many tokens, from a random sentence of a random document on."""
    document = remembered[int(random.integers(len(remembered)))]
    start = int(random.integers(len(document))) if document else 0
    found: Sentence = []
    for sentence in document[start:]:
        found += sentence
        if len(found) >= length:
            break
    return found[: max(length, MIN_TOKENS)]


def _cut(pair: Pair, tokens: int) -> Pair:
    """The longer passage gives way, at its far end."""
    first, second = len(pair.first), len(pair.second)
    if first + second > tokens:
        kept = max(tokens - second, tokens // 2) if first >= second else first
        first = min(first, kept, tokens if not second else tokens - 1)
        second = min(second, tokens - first)
    return Pair(pair.first[:first], pair.second[:second], pair.random)
