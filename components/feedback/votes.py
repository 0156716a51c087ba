"""A vote as the store returns it, made into a row to learn from: text alone, with secrets and personal data masked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from components.datasets.formats import Row
from components.feedback.items import FORM, NO_CALL, prompt_key
from components.feedback.privacy import mask
from components.tokenization.response_format import requested_format


def item_of(vote: Mapping[str, Any]) -> Row:
    """One row of a partition.

    `vote` is what `Store.behind_watermark` returns, with an answer.
    """
    body: Mapping[str, Any] = vote["body"]
    form = requested_format(body.get("response_format"))
    messages = [*([form] if form else []), *(body.get("messages") or [])]
    return {
        "feedback_id": vote["id"],
        "sequence": vote["sequence"],
        "completion_id": vote["completion_id"],
        "created": vote["created"],
        "model": vote["model"],
        "messages": [_message(message) for message in messages],
        "tools": json.dumps(body["tools"], ensure_ascii=False) if body.get("tools") else None,
        "steps": json.dumps(_masked(vote["steps"]), ensure_ascii=False),
        "answer": mask(vote["content"]),
        "rating": vote["rating"],
        "correction": _mask(vote["correction"]),
        "comment": _mask(vote["comment"]),
        "voice": vote["voice"],
        "skill": FORM if form else _skill(vote),
    }


def traits(item: Row) -> Row:
    """One flat row of what the suite `feedback` checks of an item."""
    messages = item["messages"]
    said = [message["content"] or "" for message in messages]
    same = ("sequence", "model", "rating", "correction", "comment", "voice", "skill")
    return {
        "id": item["feedback_id"],
        # An answer without words can be corrected, not rated.
        "answer": item["answer"] if item["answer"].strip() else item["correction"] or "",
        **{name: item[name] for name in same},
        "roles": " ".join("call" if message["tool_calls"] else str(message["role"]) for message in messages),
        "question": " ".join(message["content"] or "" for message in messages if message["role"] == "user")[:200],
        "characters": sum(map(len, said)) + len(item["answer"]) + len(messages),
    }


def content_digest(item: Row) -> str:
    """Equal where one voice says the same of the same prompt: the same correction, or the same of the same answer."""
    corrects = item["correction"] is not None
    what = item["correction"] if corrects else item["answer"]
    spelled = json.dumps([item["voice"], prompt_key(item["messages"]), item["rating"], corrects, what])
    return hashlib.blake2b(spelled.encode(), digest_size=16).hexdigest()


def _message(message: Mapping[str, Any]) -> Row:
    calls = [
        {
            "id": call.get("id"),
            "type": call.get("type") or "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": mask(call["function"].get("arguments") or ""),
            },
        }
        for call in message.get("tool_calls") or []
    ]
    return {
        "role": message.get("role"),
        "content": _mask(_text(message.get("content"))),
        "tool_calls": calls or None,
        "tool_call_id": message.get("tool_call_id"),
        "name": message.get("name"),
    }


def _text(content: str | Sequence[Mapping[str, Any]] | None) -> str | None:
    """Content as text: of parts, those that are text."""
    if content is None or isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if part.get("type") == "text")


def _skill(vote: Mapping[str, Any]) -> str:
    """The last tool that the answer called, its own or the client's."""
    called = [step["name"] for step in vote["steps"] or [] if step.get("type") == "call"]
    called += [call["function"]["name"] for call in vote["tool_calls"] or []]
    return str(called[-1]) if called else NO_CALL


def _mask(text: str | None) -> str | None:
    return None if text is None else mask(text)


def _masked(value: Any) -> Any:
    """JSON with every string in it masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: _masked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner) for inner in value]
    return value
