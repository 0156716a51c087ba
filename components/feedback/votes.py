"""Converts a stored vote into a feedback item: text with secrets and personal data masked, pictures by digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.datasets.formats import Row
from components.feedback.items import FORM, NO_CALL, PICTURES, prompt_key
from components.feedback.pictures import marked_content
from components.feedback.privacy import mask
from components.media.messages import IMAGE, plain_text
from components.tokenization.response_format import requested_format


def item_of(vote: Mapping[str, Any]) -> Row:
    """One row of a partition.

    `vote` is what `Store.behind_watermark` returns, with an answer.
    """
    body: Mapping[str, Any] = vote["body"]
    response_format = requested_format(body.get("response_format"))
    messages = [*([response_format] if response_format else []), *(body.get("messages") or [])]
    images = [digest for message in messages for digest in marked_content(message.get("content"))[1]]
    # In a conversation with pictures every mark is of one.
    text = _masked_plain_text if images else mask
    return {
        "feedback_id": vote["id"],
        "sequence": vote["sequence"],
        "completion_id": vote["completion_id"],
        "created": vote["created"],
        "model": vote["model"],
        "messages": [_message(message, bool(images)) for message in messages],
        "images": images,
        "tools": json.dumps(body["tools"], ensure_ascii=False) if body.get("tools") else None,
        "steps": json.dumps(_masked(vote["steps"], text), ensure_ascii=False),
        "answer": text(vote["content"]),
        "rating": vote["rating"],
        "correction": None if vote["correction"] is None else text(vote["correction"]),
        "comment": _mask(vote["comment"]),
        "voice": vote["voice"],
        "skill": FORM if response_format else _skill(vote, PICTURES if images else NO_CALL),
    }


def item_features(item: Row) -> Row:
    """The features of an item that the suite `feedback` validates, as a flat row."""
    messages = item["messages"]
    texts = [message["content"] or "" for message in messages]
    copied = ("sequence", "model", "rating", "correction", "comment", "voice", "skill")
    return {
        "id": item["feedback_id"],
        # An answer without text can be corrected, not rated.
        "answer": item["answer"] if item["answer"].strip() else item["correction"] or "",
        **{name: item[name] for name in copied},
        "roles": " ".join("call" if message["tool_calls"] else str(message["role"]) for message in messages),
        "question": " ".join(message["content"] or "" for message in messages if message["role"] == "user")[:200],
        "characters": sum(map(len, texts)) + len(item["answer"]) + len(messages),
    }


def content_digest(item: Row) -> str:
    """Equal for votes of one user on one prompt with the same correction, or the same rating of the same answer."""
    corrects = item["correction"] is not None
    text = item["correction"] if corrects else item["answer"]
    content = json.dumps([item["voice"], prompt_key(item["messages"], item["images"]), item["rating"], corrects, text])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _message(message: Mapping[str, Any], pictured: bool) -> Row:
    """A message; in a conversation with pictures (`pictured`), with a mark for each."""
    content = message.get("content")
    if pictured and content is not None:
        masked: str | None = IMAGE.join(map(mask, marked_content(content)[0].split(IMAGE)))
    else:
        masked = _mask(_text(content))
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
        "content": masked,
        "tool_calls": calls or None,
        "tool_call_id": message.get("tool_call_id"),
        "name": message.get("name"),
    }


def _text(content: str | Sequence[Mapping[str, Any]] | None) -> str | None:
    """Content as text; other parts are dropped."""
    if content is None or isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if part.get("type") == "text")


def _skill(vote: Mapping[str, Any], without_call: str) -> str:
    """The last tool that the answer called, the agent's or the client's."""
    names = [step["name"] for step in vote["steps"] or [] if step.get("type") == "call"]
    names += [call["function"]["name"] for call in vote["tool_calls"] or []]
    return str(names[-1]) if names else without_call


def _mask(text: str | None) -> str | None:
    return None if text is None else mask(text)


def _masked_plain_text(text: str) -> str:
    return plain_text(mask(text))


def _masked(value: Any, text: Callable[[str], str]) -> Any:
    """A JSON value whose strings are masked by `text`."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key: _masked(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner, text) for inner in value]
    return value
