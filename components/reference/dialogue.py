"""Messages of a conversation with tool calls, and the words in which the agent passes a tool's result on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from components.data.datasets import Row, row_id
from components.reference.knowledge import NOT_FOUND

Message = dict[str, Any]

ARGUMENTS = {"lookup": "symbol", "bases": "symbol", "calculate": "expression", "search": "query"}
"""The one argument of each tool."""
ERROR = "error: "


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content, "tool_calls": None, "tool_call_id": None, "name": None}


def exchange(question: str, tool: str, argument: str, result: str, number: int = 1) -> list[Message]:
    """A question, the call it wants, the tool's result and the answer."""
    call_id = f"call_{number}"
    function = {"name": tool, "arguments": json.dumps({ARGUMENTS[tool]: argument}, ensure_ascii=False)}
    call = {**said("assistant", ""), "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
    shown = {**said("tool", result), "tool_call_id": call_id, "name": tool}
    return [said("user", question), call, shown, said("assistant", answer(tool, result))]


def answer(tool: str, result: str) -> str:
    """What the agent says after a tool's result: short, and but for a few words a copy of it."""
    if result.startswith(NOT_FOUND):
        return f"I could not find {result.removeprefix(NOT_FOUND)}."
    if result.startswith(ERROR):
        reason = result.removeprefix(ERROR)
        return f"I could not do that: {reason}" + ("" if reason.endswith(".") else ".")
    if tool == "bases":
        return f"It extends {result}."
    return f"The result is {result}." if tool == "calculate" else result


def row(messages: Sequence[Message], suite: str | None = None) -> Row:
    """A conversation as a row of its dataset."""
    content = (f"{message['role']}: {message['content']}" for message in messages)
    return {"id": row_id(suite or "", *content), "messages": list(messages), "tools": None, "suite": suite}


def asked(messages: Sequence[Message]) -> str:
    """Everything the user says."""
    return "\n".join(str(message["content"]) for message in messages if message["role"] == "user")
