"""What a run's classifier is worth on held-out texts, always beside the baseline that learned from the same.

`predict` takes any classifier's folder, so that candidate and champion are asked the very same texts.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import confusion_matrix, f1_score

from components.config.params import InputError, Params
from components.datasets.formats import Row, read_rows, split_digest, write_json
from components.evaluation.baseline import tfidf_probabilities
from components.evaluation.calibration import expected_calibration_error
from components.evaluation.classifier_plots import draw_confusion, draw_f1, draw_reliability
from components.inference.classifier import TextClassifier
from components.runtime.stage import StageRun, warn_on_failure

PREDICTIONS, PREDICTIONS_OF = "predictions.parquet", "predictions.json"
"""What a classifier said of each held-out text, and which texts these were."""
TEST = "test"
"""Suite of rows that name none: a user's own held-out texts."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Predictions:
    """What one model says of all texts, in their order."""

    labels: list[str]
    """The likeliest of each."""
    confidences: npt.NDArray[np.float64]
    """Its probability (N,)."""


@dataclass(frozen=True)
class HeldOutTexts:
    """The held-out texts."""

    rows: list[Row]

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.rows]

    @property
    def labels(self) -> list[str]:
        return [row["label"] for row in self.rows]

    @property
    def suites(self) -> dict[str, list[int]]:
        """The places of each suite's texts."""
        places: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            places.setdefault(row.get("suite") or TEST, []).append(place)
        return dict(sorted(places.items()))


def assess_classifier(run: StageRun) -> None:
    """Ask data/models/classifier and the baseline every held-out text; write data/assessment, metrics and plots."""
    params, collected = run.params, run.paths.collected
    asked = read_held_out(collected, params)
    if not asked.rows:
        raise InputError("params.yaml: classifier.dataset: no held-out texts in it; add rows")
    reader = TextClassifier.load(run.paths.classifier)
    run.progress(0, 2, texts=len(asked.rows))
    said, truncated = predict(reader, asked.texts)
    run.progress(1, 2, accuracy=accuracy(asked.labels, said.labels))
    base = baseline(collected, params, reader.labels, asked.texts)
    run.progress(2, 2, baseline_accuracy=accuracy(asked.labels, base.labels))
    figures = measure(asked, said, base, reader.labels)
    figures |= {"held_out_digest": held_out_digest(collected, params), "truncated": truncated}
    write_json(run.paths.metrics / f"{run.name}.json", figures)
    _write_plot(run.paths.metrics / f"{run.name}_f1.csv", figures["labels"])
    write_predictions(run.paths.assessment(run.item), asked, said, base, figures["held_out_digest"])
    run.tracker.metrics(flat_metrics(figures))
    confusion = confusion_matrix(*_known(asked, said, reader.labels), labels=reader.labels)
    right = np.array(asked.labels) == np.array(said.labels)
    drawings: dict[str, Callable[[], Any]] = {
        "confusion_matrix.png": lambda: draw_confusion(confusion, reader.labels),
        "reliability.png": lambda: draw_reliability(said.confidences, right),
        "f1_per_label.png": lambda: draw_f1(figures["labels"]),
    }
    for name, draw in drawings.items():
        with warn_on_failure(name):
            run.tracker.figure(draw(), name)


def read_held_out(collected: Path, params: Params) -> HeldOutTexts:
    """The first `assess.max_texts` held-out texts of each suite of the classifier's datasets."""
    most = params.assess.max_texts
    rows = chain.from_iterable(read_rows(collected / name, "test") for name in params.classifier.datasets)
    asked = HeldOutTexts(list(rows))
    chosen = sorted(place for places in asked.suites.values() for place in places[:most])
    return HeldOutTexts([asked.rows[place] for place in chosen])


def predict(reader: TextClassifier, texts: Sequence[str], batch_size: int = 1024) -> tuple[Predictions, int]:
    """What a classifier says of texts, and how many were longer than it reads."""
    upcoming = iter(texts)
    found = []
    while batch := list(islice(upcoming, batch_size)):
        found += reader.classify(batch)
    confidences = np.array([one.scores[one.label] for one in found], float)
    return Predictions([one.label for one in found], confidences), sum(one.truncated for one in found)


def baseline(collected: Path, params: Params, names: Sequence[str], texts: Sequence[str]) -> Predictions:
    """What TF-IDF with logistic regression says, having learned from the texts that the classifier trains on."""
    known = [row for name in params.classifier.datasets for row in read_rows(collected / name, "train")]
    labels = sorted({row["label"] for row in known} | set(names))
    learned = ([row["text"] for row in known], [row["label"] for row in known])
    probabilities = tfidf_probabilities(*learned, labels, texts, params.seed)
    return Predictions([labels[place] for place in probabilities.argmax(1)], probabilities.max(1))


def measure(asked: HeldOutTexts, said: Predictions, base: Predictions, names: Sequence[str]) -> Figures:
    """The figures of every suite, and of every label over all of them."""
    suites = {suite: _suite_figures(asked, said, base, places) for suite, places in asked.suites.items()}
    scores = (
        f1_score(*_known(asked, one, names), labels=names, average=None, zero_division=np.nan) for one in (said, base)
    )
    counts = Counter(asked.labels)
    labels = {
        name: {"f1": _number(candidate), "baseline_f1": _number(baseline), "texts": counts[name]}
        for name, candidate, baseline in zip(names, *scores, strict=True)
    }
    score = sum(one["macro_f1"] for one in suites.values()) / len(suites)
    return {"score": round(score, 6), "suites": suites, "labels": labels}


def _suite_figures(asked: HeldOutTexts, said: Predictions, base: Predictions, places: list[int]) -> Figures:
    wanted = [asked.labels[place] for place in places]
    figures: Figures = {"texts": len(places)}
    for prefix, one in (("", said), ("baseline_", base)):
        guesses = [one.labels[place] for place in places]
        right = np.array(wanted) == np.array(guesses)
        figures |= {
            f"{prefix}accuracy": round(accuracy(wanted, guesses), 4),
            f"{prefix}macro_f1": round(float(f1_score(wanted, guesses, average="macro")), 4),
            f"{prefix}ece": round(expected_calibration_error(one.confidences[places], right), 4),
        }
    figures["baseline_is_better"] = figures["baseline_macro_f1"] > figures["macro_f1"]
    return figures


def _known(asked: HeldOutTexts, said: Predictions, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels and guesses of the texts whose labels the classifier knows."""
    known = set(names)
    pairs = [pair for pair in zip(asked.labels, said.labels, strict=True) if known.issuperset(pair)]
    return [label for label, _ in pairs], [guess for _, guess in pairs]


def accuracy(wanted: Sequence[str], guesses: Sequence[str]) -> float:
    return sum(map(str.__eq__, wanted, guesses)) / max(1, len(wanted))


def _number(value: float) -> float | None:
    """None for the F1 of a label that neither occurs nor is guessed."""
    return None if np.isnan(value) else round(float(value), 4)


def held_out_digest(collected: Path, params: Params) -> str:
    """Identity of what is asked: two assessments compare only when theirs are equal."""
    folders = [collected / name for name in params.classifier.datasets]
    return split_digest(folders, "test", params.assess.model_dump_json())


def flat_metrics(figures: Figures) -> dict[str, float]:
    """The figures under the names the tracker and the registry show."""
    flat = {"score": float(figures["score"])}
    for suite, values in figures["suites"].items():
        flat |= {f"{suite}/{key}": float(value) for key, value in values.items()}
        flat[f"{suite}/score"] = float(values["macro_f1"])
    return flat


def write_predictions(folder: Path, asked: HeldOutTexts, said: Predictions, base: Predictions, digest: str) -> None:
    """Write `PREDICTIONS` and `PREDICTIONS_OF`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {name: [row.get(name) for row in asked.rows] for name in ("id", "suite", "text", "label")}
    guesses: dict[str, Any] = {"predicted": said.labels, "confidence": said.confidences, "baseline": base.labels}
    pq.write_table(pa.table({**columns, **guesses}), folder / PREDICTIONS)
    write_json(folder / PREDICTIONS_OF, {"held_out_digest": digest})


def _write_plot(path: Path, labels: dict[str, Figures]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["label", "f1", "baseline_f1", "texts"])
        writer.writerows([name, one["f1"], one["baseline_f1"], one["texts"]] for name, one in labels.items())
