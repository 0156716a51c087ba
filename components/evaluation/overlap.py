"""How much of a reference text another text has: ROUGE and chrF as their keepers compute them, all from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Overlap:
    """Of texts with their references."""

    rouge1: float
    """F-measure of words, stemmed; mean over texts (Lin 2004)."""
    rouge2: float
    """The same of pairs of words."""
    rougeL: float
    """The same of the longest common subsequence of words."""
    chrf: float
    """F-measure of runs of up to six characters over all texts together (Popović 2015)."""
    each: tuple[float, ...]
    """ROUGE-L of each text, in order: what a paired test compares."""


def overlap(texts: Sequence[str], references: Sequence[str]) -> Overlap:
    """Compare each text with its reference.

    Raises: ValueError when there are not as many of one as of the other, or none.
    """
    if len(texts) != len(references) or not texts:
        raise ValueError(
            f"texts: {len(texts)} with {len(references)} references; give as many of each, and at least one"
        )
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scored = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    each = {kind: [float(score[kind].fmeasure) for score in scored] for kind in kinds}
    chrf = CHRF().corpus_score(list(texts), [list(references)]).score / 100
    means = {kind: sum(values) / len(values) for kind, values in each.items()}
    return Overlap(**means, chrf=chrf, each=tuple(each["rougeL"]))
