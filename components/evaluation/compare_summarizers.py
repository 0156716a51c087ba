"""A summarizer measured on held-out sources beside the targets of the nearest training sources, and compared with the
champion. The same metrics hold for any set of pairs, translation too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.config.params import Params
from components.datasets.formats import Row, read_rows
from components.evaluation.gate import GateDecision, decide_by_suite
from components.evaluation.held_out import Figures, held_out_digest, read_held_out, saved_outputs, suites
from components.inference.summarizer import Summarizer

BATCH = 256


@dataclass(frozen=True)
class Overlap:
    """Texts against their references, all from 0 to 1."""

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
    """ROUGE and chrF of each text with its reference, as rouge-score and sacrebleu compute them.

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


def summarize_all(
    summarizer: Summarizer,
    rows: Sequence[Row],
    beams: int,
    progress: Callable[..., None] = lambda *args, **values: None,
) -> list[str]:
    """The summary of each row's source, in order."""
    summaries: list[str] = []
    for start in range(0, len(rows), BATCH):
        summaries += summarizer.write([row["source"] for row in rows[start : start + BATCH]], beams)
        progress(len(summaries), len(rows), beams=beams)
    return summaries


def baseline(collected: Path, params: Params, rows: Sequence[Row]) -> list[str]:
    """For each row, the target of the training source nearest to its source."""
    known = [row for name in params.summarizer.datasets for row in read_rows(collected / name, "train")]
    sources, targets = ([row[column] for row in known] for column in ("source", "target"))
    return nearest_targets(sources, targets, [row["source"] for row in rows])


def nearest_targets(sources: Sequence[str], targets: Sequence[str], texts: Sequence[str]) -> list[str]:
    """For each text, the target of the source that is nearest to it by cosine similarity of TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[A-Za-z0-9]+")
    known = vectorizer.fit_transform(list(sources))
    index = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(known)
    nearest = index.kneighbors(vectorizer.transform(list(texts)), return_distance=False)
    return [targets[number] for number in nearest[:, 0]]


def measure(rows: Sequence[Row], outputs: dict[str, list[str]]) -> Figures:
    """ROUGE, chrF and exact matches of every suite; `outputs` by the prefix of their figures."""
    by_suite: dict[str, Figures] = {}
    for suite, indices in suites(rows).items():
        references = [rows[index]["target"] for index in indices]
        figures: Figures = {"texts": len(indices)}
        for prefix, texts in outputs.items():
            chosen = [texts[index] for index in indices]
            common = overlap(chosen, references)
            exact = sum(map(str.__eq__, chosen, references)) / len(references)
            values = {"rouge1": common.rouge1, "rouge2": common.rouge2, "rougeL": common.rougeL}
            values |= {"chrf": common.chrf, "exact_match": exact}
            figures |= {f"{prefix}{name}": round(value, 4) for name, value in values.items()}
        figures["baseline_is_better"] = figures["baseline_rougeL"] > figures["rougeL"]
        by_suite[suite] = figures
    score = sum(figures["rougeL"] for figures in by_suite.values()) / len(by_suite)
    return {"score": round(score, 6), "suites": by_suite}


def judge_summarizer(
    candidate: Path, champion: Path, collected: Path, params: Params, candidate_outputs: Path | None = None
) -> GateDecision:
    """Whether the summarizer in `candidate` may replace that in `champion`: by the ROUGE-L of each text, in pairs.

    The folder `candidate_outputs` holds the summaries that `assess` saved, if any; the champion's are generated anew.
    """
    rows, beams = read_held_out("summarizer", collected, params), params.assess.beams
    saved = saved_outputs("summarizer", candidate_outputs, held_out_digest("summarizer", collected, params))
    summaries = saved["written"] if saved is not None else summarize_all(Summarizer.load(candidate), rows, beams)
    return judge_summaries(rows, summaries, summarize_all(Summarizer.load(champion), rows, beams), params)


def judge_summaries(
    rows: Sequence[Row], candidate: Sequence[str], champion: Sequence[str], params: Params
) -> GateDecision:
    """The decision on summaries of all sources, in their order."""
    references = [row["target"] for row in rows]
    scores, champion_scores = (overlap(texts, references).each for texts in (candidate, champion))
    return decide_by_suite(suites(rows), scores, champion_scores, params.judge)
