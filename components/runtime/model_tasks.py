"""The task of a model folder, from its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from components.config.params import InputError
from components.config.paths import CONFIG

Task = Literal["chat", "classify", "summarize"]
_TASKS: dict[str, Task] = {"ForSequenceClassification": "classify", "T5ForConditionalGeneration": "summarize"}
"""By the end of the architecture's name."""


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
