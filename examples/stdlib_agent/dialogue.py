"""Messages of a conversation with tool calls, and the agent's wording of tool results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from components.datasets.formats import Row, row_id
from examples.stdlib_agent.knowledge import NOT_FOUND

Message = dict[str, Any]

ARGUMENTS = {
    "lookup": "symbol",
    "bases": "symbol",
    "module": "symbol",
    "calculate": "expression",
    "search": "query",
}
"""The argument of each tool."""
ERROR = "error: "


class Hop(NamedTuple):
    """One tool call of an answer, with its result."""

    tool: str
    argument: str
    result: str

    @property
    def next_argument(self) -> str:
        """The name in the result, for the next call; empty where there is none, or several."""
        if self.result.startswith((NOT_FOUND, ERROR)) or (self.tool == "bases" and " and " in self.result):
            return ""
        return self.result.partition(": ")[0] if self.tool == "search" else self.result


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content, "tool_calls": None, "tool_call_id": None, "name": None}


def exchange(question: str, hops: Sequence[Hop], number: int = 1) -> list[Message]:
    """A question, its calls with their results, and the answer; `number` is that of the first call."""
    messages = [turn("user", question)]
    for index, hop in enumerate(hops):
        call_id = f"call_{number + index}"
        arguments = json.dumps({ARGUMENTS[hop.tool]: hop.argument}, ensure_ascii=False)
        call = {"id": call_id, "type": "function", "function": {"name": hop.tool, "arguments": arguments}}
        messages.append({**turn("assistant", ""), "tool_calls": [call]})
        messages.append({**turn("tool", hop.result), "tool_call_id": call_id, "name": hop.tool})
    return [*messages, turn("assistant", answer(hops[-1].tool, hops[-1].result))]


def answer(tool: str, result: str) -> str:
    """The agent's answer after a tool's result: short, mostly a copy of it."""
    if result.startswith(NOT_FOUND):
        return f"I could not find {result.removeprefix(NOT_FOUND)}."
    if result.startswith(ERROR):
        reason = result.removeprefix(ERROR)
        return f"I could not do that: {reason}" + ("" if reason.endswith(".") else ".")
    if tool == "bases":
        return f"It extends {result}."
    if tool == "module":
        return f"It is in {result}."
    return f"The result is {result}." if tool == "calculate" else result


def in_words(messages: Sequence[Message]) -> list[Message]:
    """The messages without calls and their results."""
    return [message for message in messages if message["role"] != "tool" and not message["tool_calls"]]


def row(messages: Sequence[Message], suite: str | None = None) -> Row:
    """A conversation as a row of its dataset."""
    content = (f"{message['role']}: {message['content']}" for message in messages)
    return {"id": row_id(suite or "", *content), "messages": list(messages), "tools": None, "suite": suite}


def user_text(messages: Sequence[Message]) -> str:
    """The text of the user's messages."""
    return "\n".join(str(message["content"]) for message in messages if message["role"] == "user")


def arguments(messages: Sequence[Message]) -> set[str]:
    """All arguments of tool calls, without the () of functions."""
    calls = (call["function"]["arguments"] for message in messages for call in message.get("tool_calls") or ())
    return {str(value).removesuffix("()") for call in calls for value in json.loads(call).values()}
