"""Stage: measure a run's classifier or summarizer on held-out texts, beside a baseline."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix

from components.config.params import InputError
from components.datasets.formats import Row, write_json
from components.evaluation import compare_classifiers as classifiers
from components.evaluation import compare_summarizers as summarizers
from components.evaluation.held_out import (
    TEST,
    Section,
    flat_metrics,
    held_out_digest,
    read_held_out,
    save_outputs,
    suites,
)
from components.inference.classifier import TextClassifier
from components.inference.summarizer import Summarizer
from components.runtime.stage import StageRun, warn_on_failure

SAMPLES = 40
"""Summaries of each suite that are shown beside a run."""
READABLE = 40
"""Labels up to which the confusion matrix names each."""
MAX_INCHES = 300
"""Height of a figure; matplotlib refuses 2^16 pixels and more."""


def assess(run: StageRun) -> None:
    """Write data/assessment/MODEL, its metrics file and plots.

    Raises: InputError when the section's datasets hold nothing out.
    """
    {"classifier": _assess_classifier, "summarizer": _assess_summarizer}[run.item](run)


def _assess_classifier(run: StageRun) -> None:
    params, collected = run.params, run.paths.collected
    rows = _held_out(run, "classifier", "texts")
    texts, labels = ([row[column] for row in rows] for column in ("text", "label"))
    classifier = TextClassifier.load(run.paths.classifier)
    run.progress(0, 2, texts=len(rows))
    predictions, truncated = classifiers.predict(classifier, texts)
    run.progress(1, 2, accuracy=classifiers.accuracy(labels, predictions.labels))
    base = classifiers.baseline(collected, params, texts)
    run.progress(2, 2, baseline_accuracy=classifiers.accuracy(labels, base.labels))
    figures = classifiers.measure(rows, predictions, base, classifier.labels)
    figures |= {"held_out_digest": held_out_digest("classifier", collected, params), "truncated": truncated}
    write_json(run.paths.metrics / f"{run.name}.json", figures)
    header = ("label", "f1", "baseline_f1", "texts")
    lines = ([name, *(values[column] for column in header[1:])] for name, values in figures["labels"].items())
    _write_plot(run.paths.metrics / f"{run.name}_f1.csv", header, lines)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in ("id", "suite", "text", "label")}
    columns |= {"predicted": predictions.labels, "confidence": predictions.confidences, "baseline": base.labels}
    save_outputs("classifier", run.paths.assessment(run.item), columns, figures["held_out_digest"])
    run.tracker.metrics(flat_metrics(figures, "macro_f1"))
    known, predicted = classifiers.known_pairs(rows, predictions, classifier.labels)
    confusion = confusion_matrix(known, predicted, labels=classifier.labels)
    correct = np.array(labels) == np.array(predictions.labels)
    drawings: dict[str, Callable[[], Any]] = {
        "confusion_matrix.png": lambda: draw_confusion(confusion, classifier.labels),
        "reliability.png": lambda: draw_reliability(predictions.confidences, correct),
        "f1_per_label.png": lambda: draw_f1(figures["labels"]),
    }
    for name, draw in drawings.items():
        with warn_on_failure(name):
            run.tracker.figure(draw(), name)


def _assess_summarizer(run: StageRun) -> None:
    params, collected = run.params, run.paths.collected
    rows = _held_out(run, "summarizer", "pairs")
    summarizer, beams = Summarizer.load(run.paths.summarizer), params.assess.beams
    summaries = summarizers.summarize_all(summarizer, rows, beams, run.progress)
    nearest = summarizers.baseline(collected, params, rows)
    greedy = summaries if beams == 1 else summarizers.summarize_all(summarizer, rows, 1, run.progress)
    figures = summarizers.measure(rows, {"": summaries, "baseline_": nearest, "greedy_": greedy})
    figures["held_out_digest"] = held_out_digest("summarizer", collected, params)
    write_json(run.paths.metrics / f"{run.name}.json", figures)
    header = ("suite", "rougeL", "baseline_rougeL", "chrf")
    lines = ([name, *(values[column] for column in header[1:])] for name, values in figures["suites"].items())
    _write_plot(run.paths.metrics / f"{run.name}_overlap.csv", header, lines)
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("id", "suite", "source", "target")}
    columns |= {"suite": [row["suite"] or TEST for row in rows], "written": summaries}
    save_outputs("summarizer", run.paths.assessment(run.item), columns, figures["held_out_digest"])
    run.tracker.metrics(flat_metrics(figures, "rougeL"))
    samples = [index for indices in suites(rows).values() for index in indices[:SAMPLES]]
    table = {"suite": "suite", "source": "source", "wanted": "target", "written": "written", "nearest": "nearest"}
    columns["nearest"] = nearest
    run.tracker.table(
        "summaries.json", {shown: [columns[name][index] for index in samples] for shown, name in table.items()}
    )


def _held_out(run: StageRun, section: Section, rows_name: str) -> list[Row]:
    rows = read_held_out(section, run.paths.collected, run.params)
    if not rows:
        raise InputError(f"params.yaml: {section}.dataset: no held-out {rows_name} in it; add rows")
    return rows


def _write_plot(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw_confusion(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> Any:
    """The share of each label's texts that are predicted as each label."""
    from matplotlib.figure import Figure

    side = 4 + 0.25 * min(len(names), READABLE)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="Blues"), shrink=0.7, label="share of the label's texts")
    if len(names) <= READABLE:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_xlabel("predicted label")
    axes.set_ylabel("true label")
    return figure


def draw_reliability(confidences: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> Any:
    """The share of correct predictions against their confidence; on the diagonal, the model is calibrated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    bins = classifiers.reliability(confidences, correct)
    axes.plot([0, 1], [0, 1], color="#999999", linestyle="--")
    axes.plot([each.confidence for each in bins], [each.accuracy for each in bins], marker="o", color="#4477aa")
    axes.set_title(f"expected calibration error {classifiers.expected_calibration_error(confidences, correct):.3f}")
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure


def draw_f1(labels: Mapping[str, Mapping[str, Any]]) -> Any:
    """F1 of each label, beside the baseline's."""
    from matplotlib.figure import Figure

    shown = {name: values for name, values in reversed(list(labels.items())) if values["f1"] is not None}
    figure = Figure(figsize=(8, min(0.35 * len(shown) + 1.2, MAX_INCHES)), layout="constrained")
    axes = figure.add_subplot()
    positions = np.arange(len(shown))
    axes.barh(positions + 0.2, [values["f1"] for values in shown.values()], 0.4, label="classifier", color="#4477aa")
    axes.barh(
        positions - 0.2,
        [values["baseline_f1"] or 0.0 for values in shown.values()],
        0.4,
        label="baseline",
        color="#bbbbbb",
    )
    axes.set_yticks(positions, list(shown), fontsize=7, parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1")
    axes.legend(loc="lower right")
    return figure
