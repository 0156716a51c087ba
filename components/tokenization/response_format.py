"""The system message for a response format, in training as in serving.

A grammar constrains the answer whatever the model does; the message names the keys to a model that was trained with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MAX_KEYS = 12
"""Most keys in the message: more would fill a small context."""


def format_message(keys: Iterable[str] = ()) -> dict[str, Any]:
    """The system message for JSON with these keys; for any JSON without keys."""
    names = ", ".join(list(keys)[:MAX_KEYS])
    return {"role": "system", "content": f"Answer in JSON: {names}" if names else "Answer in JSON"}


def schema_keys(schema: Mapping[str, Any] | bool) -> list[str]:
    """The keys of a JSON schema's own `properties`."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return [str(key) for key in properties] if isinstance(properties, Mapping) else []


def requested_format(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The message for OpenAI's `response_format`; None for text."""
    requested = response_format or {}
    if requested.get("type") not in ("json_object", "json_schema"):
        return None
    return format_message(schema_keys((requested.get("json_schema") or {}).get("schema") or {}))
