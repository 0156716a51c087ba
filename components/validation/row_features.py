"""Features of a conversation or a preference as one flat row: the columns of its suite's expectations.

A column of a fault is null where there is none, and else names the turn and the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.config.errors import InputError
from components.datasets.formats import Kind, Row
from components.media.messages import IMAGE, check_marks
from components.media.pictures import decode_picture

_ROLES = ("system", "user", "assistant", "tool")


def conversation_features(row: Row) -> Row:
    """One flat row of strings and counts; roles are joined by spaces, an assistant turn with tool calls is a `call`."""
    messages = row["messages"] or []
    roles = ["call" if message.get("tool_calls") else str(message.get("role")) for message in messages]
    questions = [message.get("content") or "" for message in messages if message.get("role") == "user"]
    unanswered, uncalled = _unmatched(messages)
    return {
        "id": row["id"],
        "roles": " ".join(roles),
        "question": " ".join(questions)[:200],
        "empty_answers": _empty_answers(messages),
        "unanswered_calls": unanswered,
        "uncalled_results": uncalled,
        "unreadable_calls": _unreadable_calls(messages),
        "unreadable_tools": _unreadable_tools(row.get("tools")),
        "unknown_roles": next(
            (f"turn {i}: {m['role']!r}" for i, m in enumerate(messages, 1) if m["role"] not in _ROLES), None
        ),
        "characters": sum(len(message.get("content") or "") for message in messages) + len(messages),
    }


_FAULTS = (
    "empty_answers",
    "unanswered_calls",
    "uncalled_results",
    "unreadable_calls",
    "unreadable_tools",
    "unknown_roles",
)


def preference_features(row: Row) -> Row:
    """One flat row of a pair or an unpaired label; a fault names its side."""
    prompt = row["prompt"] or []
    prompt_features = conversation_features({"id": row["id"], "messages": prompt, "tools": None})
    sides = {side: row[side] for side in ("chosen", "rejected") if row[side]}
    whole = {
        side: conversation_features({"id": row["id"], "messages": [*prompt, *messages], "tools": row["tools"]})
        for side, messages in sides.items()
    }
    faults = {
        fault: next(
            (f"{side}: {features[fault]}" for side, features in whole.items() if features[fault] is not None), None
        )
        for fault in _FAULTS
    }
    ends = (
        f"{side}: {messages[0]['role']} to {messages[-1]['role']}"
        for side, messages in sides.items()
        if {messages[0]["role"], messages[-1]["role"]} != {"assistant"}
    )
    return {
        "id": row["id"],
        "prompt_roles": prompt_features["roles"],
        "question": prompt_features["question"],
        "answers": " ".join(sides),
        "equal_answers": "chosen and rejected" if len(sides) == 2 and row["chosen"] == row["rejected"] else None,
        "foreign_answers": next(ends, None),
        **faults,
        "characters": max((features["characters"] for features in whole.values()), default=0),
    }


def picture_features(row: Row) -> Row:
    """The features of a conversation, with the faults of its pictures."""
    images, messages = row["images"] or [], row["messages"] or []
    return {
        **conversation_features(row),
        "unreadable_pictures": next(filter(None, map(_unreadable, range(1, len(images) + 1), images)), None),
        "miscounted_pictures": _miscounted(messages, len(images)),
        "pictures_in_answers": next(
            (
                f"turn {number}: {shown}"
                for number, message in enumerate(messages, 1)
                if message["role"] == "assistant" and IMAGE in (shown := str(message.get("content"))[:80])
            ),
            None,
        ),
    }


def _unreadable(number: int, content: bytes | None) -> str | None:
    try:
        decode_picture(content or b"", f"picture {number}")
    except InputError as error:
        return str(error)
    return None


def _miscounted(messages: Sequence[Row], pictures: int) -> str | None:
    try:
        check_marks(messages, pictures, "messages")
    except InputError as error:
        return str(error)
    return None


ROW_FEATURES: Mapping[Kind, Callable[[Row], Row]] = {
    "conversations": conversation_features,
    "preferences": preference_features,
    "images": picture_features,
}
"""Features of the kinds whose rows hold messages; other kinds have flat rows."""


def _empty_answers(messages: Sequence[Row]) -> str | None:
    for number, message in enumerate(messages, 1):
        if (
            message["role"] == "assistant"
            and not message.get("tool_calls")
            and not (message.get("content") or "").strip()
        ):
            return f"turn {number}: an assistant turn without text or tool call"
    return None


def _unmatched(messages: Sequence[Row]) -> tuple[str | None, str | None]:
    """(a call without a result, a result without a call), the first of each."""
    waiting: dict[Any, str] = {}
    unanswered = uncalled = None
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            if waiting.pop(message.get("tool_call_id"), None) is None:
                uncalled = uncalled or f"turn {number}: tool_call_id {message.get('tool_call_id')!r}"
            continue
        unanswered = unanswered or next(iter(waiting.values()), None)
        calls = message.get("tool_calls") or []
        waiting = {call["id"]: f"turn {number}: call {call['id']!r}" for call in calls}
    return unanswered, uncalled


def _unreadable_calls(messages: Sequence[Row]) -> str | None:
    for number, message in enumerate(messages, 1):
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            if not function.get("name"):
                return f"turn {number}: a call without a function name"
            if not isinstance(_json(function.get("arguments")), dict):
                return f"turn {number}: arguments of {function['name']}: {str(function.get('arguments'))[:80]}"
    return None


def _unreadable_tools(tools: str | None) -> str | None:
    if tools is None:
        return None
    listed = _json(tools)
    named = isinstance(listed, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) and tool["function"].get("name")
        for tool in listed
    )
    return None if named else str(tools)[:80]


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
