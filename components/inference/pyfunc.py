"""Classifier and summarizer as MLflow's generic model: `mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(...)`.

Rows come as strings, or as a frame whose column `text` or `source` (else its first) holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.inference.classifier import TextClassifier
from components.inference.summarizer import Summarizer
from components.runtime.model_tasks import task_of

DEFAULTS: Mapping[str, Any] = {}
"""Parameters of `predict` and their values where none are given."""
EXAMPLE = "Hello"


class Predictor:
    """A loaded model folder that classifies or summarizes rows."""

    def __init__(self, folder: Path) -> None:
        summarizes = task_of(folder) == "summarize"
        self._model: Summarizer | TextClassifier = (Summarizer if summarizes else TextClassifier).load(folder)

    def predict(self, rows: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """The label or the summary of each row, in order."""
        if hasattr(rows, "columns"):
            column = next((name for name in ("text", "source") if name in rows.columns), rows.columns[0])
            rows = rows[column].tolist()
        texts = [str(row) for row in rows]
        if isinstance(self._model, Summarizer):
            return self._model.write(texts)
        return [prediction.label for prediction in self._model.classify(texts)]


def _load_pyfunc(path: str) -> Predictor:
    """The name MLflow looks for in a loader module."""
    return Predictor(Path(path))
