"""What a prompt says of the form that an answer is to have, in training as in serving.

A grammar holds the answer to its form whatever the model does; the words tell a model that was trained with them which
keys it is going to fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MAX_KEYS = 12
"""Keys that are named; of more a small context would be full."""


def format_message(keys: Iterable[str] = ()) -> dict[str, Any]:
    """The system message that asks for JSON with these keys; for any JSON where none are given."""
    named = ", ".join(list(keys)[:MAX_KEYS])
    return {"role": "system", "content": f"Answer in JSON: {named}" if named else "Answer in JSON"}


def schema_keys(schema: Mapping[str, Any] | bool) -> list[str]:
    """The keys of the objects that fit a JSON schema, as far as it names them itself."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return [str(key) for key in properties] if isinstance(properties, Mapping) else []


def requested_format(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The message for OpenAI's `response_format`; None where it asks for words."""
    given = response_format or {}
    if given.get("type") not in ("json_object", "json_schema"):
        return None
    return format_message(schema_keys((given.get("json_schema") or {}).get("schema") or {}))
