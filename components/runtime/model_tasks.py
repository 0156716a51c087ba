"""What a model folder is for, as its architecture tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from components.config.params import InputError

Task = Literal["chat", "classify", "summarize"]
_TASKS: dict[str, Task] = {"ForSequenceClassification": "classify", "T5ForConditionalGeneration": "summarize"}
"""By the end of the architecture's name."""


def task_of(folder: Path) -> Task:
    """The task of a model folder; whatever is no classifier and no encoder-decoder chats.

    Raises: InputError when it has no readable config.json.
    """
    path = folder / "config.json"
    try:
        (architecture, *_) = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a readable model configuration: {error}") from None
    return next((task for ending, task in _TASKS.items() if str(architecture).endswith(ending)), "chat")
