"""A model's saved outputs for the held-out rows, whatever its task: intervals of its scores, and its mistakes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from components.datasets.formats import Row
from components.evaluation.compare_summarizers import overlap
from components.evaluation.evaluate import ANSWERS
from components.evaluation.held_out import OUTPUTS, TEST
from components.evaluation.metrics import wilson_interval
from components.evaluation.questions import correctness

RESAMPLES = 500
Interval = tuple[float, float]


@dataclass(frozen=True)
class Output:
    """A model's output for one held-out row."""

    suite: str
    question: str
    expected: str
    answer: str
    score: float
    """1: right, 0: wrong; of a summary its ROUGE-L."""


def read_outputs(folder: Path) -> list[Output]:
    """The outputs that `evaluate`, `assess` or `judge` saved in a folder; empty where there are none."""
    readers: dict[str, Callable[[list[Row]], list[Output]]] = {
        ANSWERS: _answers,
        f"{OUTPUTS['classifier']}.parquet": _predictions,
        f"{OUTPUTS['summarizer']}.parquet": _summaries,
    }
    for name, read in readers.items():
        if (folder / name).is_file():
            return read(pq.read_table(folder / name).to_pylist())
    return []


def intervals(outputs: Sequence[Output], is_classifier: bool) -> dict[str, Interval]:
    """The 95 % interval of each suite's score: Wilson's of right and wrong answers, else by resampling the rows.

    A classifier's score is its macro-F1, another's the mean.
    """
    suites: dict[str, list[Output]] = defaultdict(list)
    for output in outputs:
        suites[output.suite].append(output)
    if is_classifier:
        return {suite: _resampled(len(rows), _macro_f1(rows)) for suite, rows in suites.items()}
    return {suite: _mean_interval(np.array([row.score for row in rows])) for suite, rows in suites.items()}


def mistakes(outputs: Sequence[Output], each: int) -> dict[str, list[tuple[str, str, str]]]:
    """The first outputs of each suite that are wrong: question, right answer and the model's answer."""
    wrong: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for output in outputs:
        if output.score < 1 and output.answer != output.expected and len(wrong[output.suite]) < each:
            wrong[output.suite].append((output.question, output.expected, output.answer or "(nothing)"))
    return wrong


def _mean_interval(scores: np.ndarray) -> Interval:
    if np.isin(scores, (0, 1)).all():
        return wilson_interval(int(scores.sum()), len(scores))
    return _resampled(len(scores), lambda rows: float(scores[rows].mean()))


def _macro_f1(rows: Sequence[Output]) -> Callable[[np.ndarray], float]:
    from sklearn.metrics import f1_score  # here: it takes seconds, and flows import this module

    labels, predicted = (np.array([getattr(row, name) for row in rows]) for name in ("expected", "answer"))
    return lambda chosen: float(f1_score(labels[chosen], predicted[chosen], average="macro", zero_division=0))


def _resampled(count: int, statistic: Callable[[np.ndarray], float]) -> Interval:
    """The percentile bootstrap of a statistic of rows, given the rows' indices."""
    random = np.random.default_rng(0)
    values = [statistic(random.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _answers(rows: list[Row]) -> list[Output]:
    scores = correctness(rows)
    return [
        Output(row["suite"], row["question"], row["expected"], row["answer"], score)
        for row, score in zip(rows, scores, strict=True)
    ]


def _predictions(rows: list[Row]) -> list[Output]:
    return [
        Output(
            row["suite"] or TEST, row["text"], row["label"], row["predicted"], float(row["label"] == row["predicted"])
        )
        for row in rows
    ]


def _summaries(rows: list[Row]) -> list[Output]:
    scores = overlap([row["written"] for row in rows], [row["target"] for row in rows]).each
    return [
        Output(row["suite"] or TEST, row["source"], row["target"], row["written"], float(score))
        for row, score in zip(rows, scores, strict=True)
    ]
