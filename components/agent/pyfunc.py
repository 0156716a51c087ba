"""The agent as MLflow's generic model: `mlflow.pyfunc.load_model("models:/agent@champion").predict(...)`.

Rows come as strings, or as a column `prompt` (text) or `messages` (OpenAI's shape).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.agent.agent import Agent
from components.agent.batch_rollout import answer_all
from components.config.params import InputError
from components.inference.cache_plan import context_len
from components.inference.sampling import Sampling
from components.models.checkpoint import load_decoder

DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 128, "temperature": 0.0, "batch_size": 16}
"""Parameters of `predict` and their values where none are given."""
EXAMPLE = "Hello"


class Predictor:
    """A loaded model folder that answers rows."""

    def __init__(self, folder: Path) -> None:
        self._model = load_decoder(folder)
        self._agent = Agent.load(folder, context_len(self._model))

    def predict(self, rows: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """One answer per row, in order."""
        settings = {**DEFAULTS, **(params or {})}
        stop = (self._agent.tokenizer.end_id,)
        sampling = Sampling(int(settings["max_new_tokens"]), temperature=float(settings["temperature"]), stop_ids=stop)
        chats = [(messages, None) for messages in _chats(rows)]
        answers = answer_all(self._model, self._agent, chats, sampling, int(settings["batch_size"]))
        return [answer.content if answer else "" for answer in answers]


def _chats(rows: Any) -> list[list[dict[str, Any]]]:
    """Messages of each row of a data frame or list."""
    if hasattr(rows, "columns"):
        column = next((name for name in ("messages", "prompt") if name in rows.columns), rows.columns[0])
        rows = rows[column].tolist()
    return [_messages(row) for row in rows]


def _messages(row: Any) -> list[dict[str, Any]]:
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if isinstance(row, Mapping):
        return _messages(row.get("messages", row.get("prompt", "")))
    if len(row) and all(isinstance(message, Mapping) for message in row):
        return [dict(message) for message in row]
    raise InputError(f"prompt: {row!r} is neither a text nor a list of messages")


def _load_pyfunc(path: str) -> Predictor:
    """The name MLflow looks for in a loader module."""
    return Predictor(Path(path))
