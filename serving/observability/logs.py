"""The endpoint's log: JSON Lines with the completion id, and secrets masked."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from components.config.secrets import HIDDEN, environment_secrets, hidden

LOG_BYTES = 20_000_000
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the current code works for."""
FIELDS = "fields"
"""Key in a log call's `extra` whose entries become fields of the line, such as `completion_id`."""
_SECRET = re.compile(r"(?i)(?<=bearer )[^\s\"',]+|\blw-[A-Za-z0-9_-]{20,}")
"""Bearer tokens, and API keys created here."""
_MIN_KEY_CHARACTERS = 4
"""Shorter keys would mask ordinary words."""


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", ...fields, "exception"?}`; secrets of the environment are masked."""

    def __init__(self, keys: str = "", secrets: Sequence[str] = ()) -> None:
        super().__init__()
        stripped = {key.strip() for key in keys.split(",")}
        known = {*secrets, *(key for key in stripped if len(key) >= _MIN_KEY_CHARACTERS)}
        self._secrets = sorted(known, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **({"request_id": request_id} if (request_id := REQUEST_ID.get()) else {}),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        line = json.dumps(fields, ensure_ascii=False, default=str)
        return _SECRET.sub(HIDDEN, hidden(line, self._secrets))


def log_to(folder: Path) -> Path:
    """Write every log record to `folder/serve.log`, a rotating file, and the engine's warnings to stderr too.

    Returns its path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "serve.log"
    handler = RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=3, encoding="utf-8")
    handler.setFormatter(JsonLines(os.environ.get("LOOPWRIGHT_API_KEYS", ""), environment_secrets(os.environ)))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("loopwright.engine").handlers = [terminal]
    return file
