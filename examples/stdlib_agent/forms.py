"""Answers in JSON: what a conversation ends with where the prompt asks for that form."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from components.tokenization.response_format import format_message
from examples.stdlib_agent.dialogue import ERROR, Message, turn
from examples.stdlib_agent.knowledge import NOT_FOUND

KEYS = (
    "answer", "reply", "response", "result", "text", "message", "output", "value", "content", "summary",
    "explanation", "description", "data", "info", "statement", "words",
)  # fmt: skip
"""Under which the words of an answer may be asked for."""
MORE_SHARE = 0.35
"""Of the answers that have each of two further keys."""


def in_form(rng: random.Random, messages: Sequence[Message]) -> list[Message]:
    """The conversation with its last words as JSON; `found` and `calls` tell of the tools what their names say."""
    *before, last = messages
    results = [str(message["content"]) for message in before if message["role"] == "tool"]
    is_found = bool(results) and not results[-1].startswith((NOT_FOUND, ERROR))
    fields = {rng.choice(KEYS): last["content"]}
    fields |= {"found": is_found} if rng.random() < MORE_SHARE else {}
    fields |= {"calls": len(results)} if rng.random() < MORE_SHARE else {}
    order = rng.sample(list(fields), len(fields))
    answer = json.dumps({key: fields[key] for key in order}, ensure_ascii=False)
    return [{**turn("system", ""), **format_message(order)}, *before, {**last, "content": answer}]
