"""The task of a model folder, from its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from components.config.params import InputError
from components.config.paths import CONFIG

Task = Literal["chat", "classify", "summarize"]
TASKS: dict[str, Task] = {"agent": "chat", "classifier": "classify", "summarizer": "summarize"}
"""Tasks of the models that the pipeline registers; any other model's task is read from its folder."""
_TASKS: dict[str, Task] = {"ForSequenceClassification": "classify", "T5ForConditionalGeneration": "summarize"}
"""By the end of the architecture's name."""


def is_chat(version: str) -> bool:
    """Whether a `NAME/VERSION` answers as the agent does; a summarizer's answers are no lessons for it."""
    return TASKS.get(version.partition("/")[0], "chat") == "chat"


def task_of(folder: Path) -> Task:
    """The task of a model folder: `chat` but for classifiers and encoder-decoders.

    Raises: InputError when it has no readable config.json.
    """
    path = folder / CONFIG
    try:
        (architecture, *_) = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a readable model configuration: {error}") from None
    return next((task for ending, task in _TASKS.items() if str(architecture).endswith(ending)), "chat")
