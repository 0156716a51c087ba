"""A classifier measured on held-out texts beside a TF-IDF baseline, and compared with the champion.

Candidate and champion classify the very same texts. Only a text on which they differ counts: an exact sign test on
right and wrong (McNemar's), suite by suite and over all texts, by the same rules as the agent's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import f1_score

from components.config.params import Params
from components.datasets.formats import Row, read_rows
from components.evaluation.gate import GateDecision, decide_by_suite
from components.evaluation.held_out import Figures, held_out_digest, read_held_out, saved_outputs, suites
from components.inference.classifier import TextClassifier

BINS = 15
"""Of confidences, as in Guo et al. 2017 (arXiv 1706.04599)."""


@dataclass(frozen=True)
class Predictions:
    """One model's predictions of all texts, in their order."""

    labels: list[str]
    """The most probable label of each text."""
    confidences: npt.NDArray[np.float64]
    """Its probability (N,)."""


def predict(classifier: TextClassifier, texts: Sequence[str], batch_size: int = 1024) -> tuple[Predictions, int]:
    """A classifier's predictions, and how many texts were longer than its context."""
    results = []
    for start in range(0, len(texts), batch_size):
        results += classifier.classify(texts[start : start + batch_size])
    confidences = np.array([result.scores[result.label] for result in results], float)
    return Predictions([result.label for result in results], confidences), sum(each.truncated for each in results)


def baseline(collected: Path, params: Params, texts: Sequence[str]) -> Predictions:
    """Predictions of TF-IDF with logistic regression, fitted to the texts that the classifier trains on.

    Words counted sublinearly and a regression of C = 10: of words or pairs of words and C of 1, 10 and 30 the best on
    BANKING77, by a point over scikit-learn's defaults.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [row for name in params.classifier.datasets for row in read_rows(collected / name, "train")]
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    model = make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=1000, random_state=params.seed))
    model.fit([row["text"] for row in rows], [row["label"] for row in rows])
    probabilities = model.predict_proba(list(texts))
    return Predictions([str(model.classes_[index]) for index in probabilities.argmax(1)], probabilities.max(1))


def measure(rows: Sequence[Row], predictions: Predictions, base: Predictions, names: Sequence[str]) -> Figures:
    """The figures of every suite, and of every label over all of them."""
    by_suite = {suite: _suite_figures(rows, predictions, base, indices) for suite, indices in suites(rows).items()}
    scores = (
        f1_score(*known_pairs(rows, each, names), labels=names, average=None, zero_division=np.nan)
        for each in (predictions, base)
    )
    counts = Counter(row["label"] for row in rows)
    labels = {
        name: {"f1": _number(f1), "baseline_f1": _number(baseline_f1), "texts": counts[name]}
        for name, f1, baseline_f1 in zip(names, *scores, strict=True)
    }
    score = sum(figures["macro_f1"] for figures in by_suite.values()) / len(by_suite)
    return {"score": round(score, 6), "suites": by_suite, "labels": labels}


def _suite_figures(rows: Sequence[Row], predictions: Predictions, base: Predictions, indices: list[int]) -> Figures:
    labels = [rows[index]["label"] for index in indices]
    figures: Figures = {"texts": len(indices)}
    for prefix, each in (("", predictions), ("baseline_", base)):
        predicted = [each.labels[index] for index in indices]
        correct = np.array(labels) == np.array(predicted)
        figures |= {
            f"{prefix}accuracy": round(accuracy(labels, predicted), 4),
            f"{prefix}macro_f1": round(float(f1_score(labels, predicted, average="macro")), 4),
            f"{prefix}ece": round(expected_calibration_error(each.confidences[indices], correct), 4),
        }
    figures["baseline_is_better"] = figures["baseline_macro_f1"] > figures["macro_f1"]
    return figures


def known_pairs(rows: Sequence[Row], predictions: Predictions, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels and predicted labels of the texts for which both are among `names`."""
    known = set(names)
    pairs = zip((row["label"] for row in rows), predictions.labels, strict=True)
    pairs_of_known = [pair for pair in pairs if known.issuperset(pair)]
    return [label for label, _ in pairs_of_known], [predicted for _, predicted in pairs_of_known]


def accuracy(labels: Sequence[str], predicted: Sequence[str]) -> float:
    return sum(map(str.__eq__, labels, predicted)) / max(1, len(labels))


def _number(value: float) -> float | None:
    """None for the F1 of a label that is neither in the texts nor predicted."""
    return None if np.isnan(value) else round(float(value), 4)


@dataclass(frozen=True)
class Bin:
    """Predictions of about the same confidence."""

    texts: int
    confidence: float
    """Mean probability of the predicted labels."""
    accuracy: float
    """Share of correct predictions."""


def reliability(confidences: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> list[Bin]:
    """Predictions by confidence in `BINS` equal steps, (0, 1/15], (1/15, 2/15], ...; empty ones left out."""
    numbers = np.clip(np.ceil(confidences * BINS).astype(int) - 1, 0, BINS - 1)
    members = (numbers == number for number in range(BINS))
    return [
        Bin(int(bin_.sum()), float(confidences[bin_].mean()), float(correct[bin_].mean()))
        for bin_ in members
        if bin_.any()
    ]


def expected_calibration_error(confidences: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> float:
    """Guo et al. 2017, eq. 3: the mean over texts of |accuracy - confidence| of their bin."""
    bins = reliability(confidences, correct)
    return sum(each.texts * abs(each.accuracy - each.confidence) for each in bins) / max(1, len(correct))


def judge_classifier(
    candidate: Path,
    champion: Path,
    collected: Path,
    params: Params,
    candidate_outputs: Path | None = None,
    champion_outputs: Path | None = None,
) -> GateDecision:
    """Whether the classifier in `candidate` may replace that in `champion`; its reason says when the baseline beats it.

    The folders `..._outputs` hold the predictions that `assess` saved, if any; those of other texts are computed anew.
    """
    rows = read_held_out("classifier", collected, params)
    candidate_labels, base = _predicted(candidate, candidate_outputs, rows, collected, params)
    champion_labels, _ = _predicted(champion, champion_outputs, rows, collected, params)
    if base is None:
        base = baseline(collected, params, [row["text"] for row in rows]).labels
    return judge_predictions(rows, candidate_labels, champion_labels, base, params)


def judge_predictions(
    rows: Sequence[Row], candidate: Sequence[str], champion: Sequence[str], baseline: Sequence[str], params: Params
) -> GateDecision:
    """The decision on predictions of all texts, in their order."""
    correct, champion_correct, base_correct = (
        [float(label == row["label"]) for label, row in zip(labels, rows, strict=True)]
        for labels in (candidate, champion, baseline)
    )
    decision = decide_by_suite(suites(rows), correct, champion_correct, params.judge)
    mean, base_mean = (sum(scores) / max(1, len(rows)) for scores in (correct, base_correct))
    word = "better" if base_mean > mean else "no better"
    comparison = f"the TF-IDF baseline is {word}: {base_mean:.3f} against {mean:.3f} of all texts right"
    return replace(decision, reason=f"{decision.reason}; {comparison}")


def _predicted(
    folder: Path, outputs: Path | None, rows: Sequence[Row], collected: Path, params: Params
) -> tuple[list[str], list[str] | None]:
    """A model's predicted labels, and the baseline's where they were saved with them."""
    saved = saved_outputs("classifier", outputs, held_out_digest("classifier", collected, params))
    if saved is not None and len(saved["predicted"]) == len(rows):
        return saved["predicted"], saved["baseline"]
    return predict(TextClassifier.load(folder), [row["text"] for row in rows])[0].labels, None
