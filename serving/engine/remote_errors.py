"""What another server's failures mean to a client of this endpoint."""

from __future__ import annotations

import json
from contextlib import suppress

from components.agent.agent import ContextTooLong
from components.config.params import InputError
from components.config.secrets import hidden
from serving.engine.backend import BackendUnavailable

BUSY = (429, 502, 503, 504)
"""Statuses of a server that may answer later."""
TOO_LONG = ("context_length_exceeded", "exceed_context_size", "context length", "context size")
"""Parts of servers' error codes, types or messages for a prompt that exceeds the context."""


def unanswered(url: str, error: Exception) -> BackendUnavailable:
    """The error of a request that got no response; the address is without its password."""
    return BackendUnavailable(f"{hidden(url)}: {error or type(error).__name__}; is the backend up?")


def error_message(body: str) -> tuple[str, str]:
    """The message of an error response, and its code, type and message."""
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        return str(error["message"]), f"{error.get('code')} {error.get('type')} {error['message']}"
    return body[:500], body


def refusal(status: int, body: str) -> Exception:
    """The error of a response that is none of a completion."""
    message, description = error_message(body)
    if status in (400, 413, 422):
        kind = ContextTooLong if any(part in description.lower() for part in TOO_LONG) else InputError
        return kind(f"the backend refused the request: {message}")
    return BackendUnavailable(f"the backend answered {status}: {message}", status in BUSY)
