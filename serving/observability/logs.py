"""The endpoint's log: one JSON object a line, with the completion it is about, and no secret in it."""

from __future__ import annotations

import json
import logging
import os
import re
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

LOG_BYTES = 20_000_000
FACTS = "facts"
"""Name of the `extra` of a record whose entries become fields of the line, such as `completion_id`."""
_SECRET = re.compile(r"(?i)(?<=bearer )[^\s\"',]+|\blw-[A-Za-z0-9_-]{20,}")
"""What is sent to prove who one is, and keys of our own making."""
_HIDDEN = "[hidden]"
_SHORTEST = 4
"""Shorter keys would be found in every other word."""


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", ...facts, "exception"?}`; keys of the environment are hidden."""

    def __init__(self, keys: str = "") -> None:
        super().__init__()
        known = sorted({key.strip() for key in keys.split(",")}, key=len, reverse=True)
        self._keys = [key for key in known if len(key) >= _SHORTEST]

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FACTS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self._hide(json.dumps(line, ensure_ascii=False, default=str))

    def _hide(self, line: str) -> str:
        for key in self._keys:
            line = line.replace(key, _HIDDEN)
        return _SECRET.sub(_HIDDEN, line)


def log_to(folder: Path) -> Path:
    """Send every log record to `folder/serve.log`, kept short, and the engine's warnings to stderr too.

    Returns the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "serve.log"
    handler = RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=3, encoding="utf-8")
    handler.setFormatter(JsonLines(os.environ.get("LOOPWRIGHT_API_KEYS", "")))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("loopwright.engine").handlers = [terminal]
    return file
