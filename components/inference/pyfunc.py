"""Classifier and summarizer as MLflow's generic model: `mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(...)`.

Rows come as strings, or as a frame whose column `text` or `source` (else its first) holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.inference.classifier import TextClassifier
from components.inference.summarizer import Summarizer
from components.runtime.model_tasks import task_of

DEFAULTS: Mapping[str, Any] = {}
"""Parameters of `predict` and their values where none are given."""
EXAMPLE = "Hello"


class Predictor:
    """A loaded model folder that labels rows, or writes of each."""

    def __init__(self, folder: Path) -> None:
        summarizes = task_of(folder) == "summarize"
        self._answer = _writes(Summarizer.load(folder)) if summarizes else _labels(TextClassifier.load(folder))

    def predict(self, rows: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """The label of each row, or what is written of it, in order."""
        if hasattr(rows, "columns"):
            column = next((name for name in ("text", "source") if name in rows.columns), rows.columns[0])
            rows = rows[column].tolist()
        return self._answer([str(row) for row in rows])


def _labels(reader: TextClassifier) -> Callable[[list[str]], list[str]]:
    return lambda texts: [one.label for one in reader.classify(texts)]


def _writes(writer: Summarizer) -> Callable[[list[str]], list[str]]:
    return lambda texts: writer.write(texts)


def _load_pyfunc(path: str) -> Predictor:
    """The name MLflow looks for in a loader module."""
    return Predictor(Path(path))
