"""A classifier as MLflow's generic model: `mlflow.pyfunc.load_model("models:/classifier@champion").predict(...)`.

Rows come as strings, or as a frame whose column `text` (else its first) holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.prediction.texts import TextReader

DEFAULTS: Mapping[str, Any] = {}
"""Parameters of `predict` and their values where none are given."""
EXAMPLE = "Serialize obj to a JSON formatted str."


class Predictor:
    """A loaded model folder that labels rows."""

    def __init__(self, folder: Path) -> None:
        self._reader = TextReader.load(folder)

    def predict(self, rows: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """The label of each row, in order."""
        if hasattr(rows, "columns"):
            rows = rows["text" if "text" in rows.columns else rows.columns[0]].tolist()
        return [one.label for one in self._reader.classify([str(row) for row in rows])]


def _load_pyfunc(path: str) -> Predictor:
    """The name MLflow looks for in a loader module."""
    return Predictor(Path(path))
