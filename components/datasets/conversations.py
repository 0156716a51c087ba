"""Conversations as others write them, in the one shape of OpenAI's chat API.

Read are OpenAI `messages`, ShareGPT `conversations` (from/value, function_call, observation) and
Alpaca `instruction`/`input`/`output`. What cannot be read is said with the place it stands at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from components.config.params import InputError

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""What a turn may be called, and what it is; `call` is an assistant's turn that holds tool calls alone."""


def read_conversation(place: str, values: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """(messages, tools as a JSON string or None) of one record.

    Raises: InputError naming the place and the reason.
    """
    if isinstance(values.get("label"), bool) or values.get("rejected") is not None:
        rating = '"chosen" and "rejected"' if "rejected" in values else 'the boolean "label"'
        raise InputError(f"{place}: found {rating}: rated answers are of kind preferences, not conversations")
    messages = read_messages(place, turns_of(place, values))
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{place}: no assistant turn among {len(messages)}; there is nothing to learn from")
    return messages, read_tools(place, values.get("tools") or values.get("functions"))


def read_messages(place: str, turns: Sequence[Any], before: Sequence[Any] = ()) -> list[Message]:
    """Messages of the turns; `before` are those that they follow, whose tool calls they may answer."""
    reader = _Reader(place)
    for number, turn in enumerate(before, 1):
        reader.push(number, turn)
    known = len(reader.messages)
    for number, turn in enumerate(turns, 1):
        reader.push(number, turn)
    return reader.messages[known:]


def turns_of(place: str, values: Mapping[str, Any]) -> list[Any]:
    """The turns of one record as they were written."""
    if values.get("messages") is not None or values.get("conversations") is not None:
        name = "messages" if values.get("messages") is not None else "conversations"
        turns = parsed(place, name, values[name])
        if not isinstance(turns, list):
            raise InputError(f"{place}: {name}: expected a list of turns, found {type(turns).__name__}")
        system = values.get("system")
        return [{"role": "system", "content": system}, *turns] if system else turns
    if "instruction" in values and "output" in values:
        return _alpaca_turns(place, values)
    raise InputError(
        f"{place}: no conversation; found columns: {', '.join(values) or 'none'}; "
        'expected "messages" (OpenAI), "conversations" (ShareGPT) or "instruction" with "output" (Alpaca)'
    )


def _alpaca_turns(place: str, values: Mapping[str, Any]) -> list[Any]:
    turns = [{"role": "system", "content": values["system"]}] if values.get("system") else []
    for pair in values.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{place}: history: expected pairs of question and answer, found {str(pair)[:40]!r}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [_text(place, name, values.get(name)) for name in ("instruction", "input")]
    question = "\n\n".join(part for part in asked if part.strip())
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": values["output"]}]


class _Reader:
    """Turns in order into messages: joins calls to the turn that makes them and results to their calls."""

    def __init__(self, place: str) -> None:
        self.messages: list[Message] = []
        self._place = place
        self._calls = 0
        self._open: list[tuple[str, str]] = []  # (id, name) of calls without a result yet

    def push(self, number: int, turn: Any) -> None:
        place = f"{self._place}: turn {number}"
        if not isinstance(turn, Mapping):
            raise InputError(f"{place}: expected an object with role and content, found {type(turn).__name__}")
        named = "from" if turn.get("from") is not None else "role"
        role = _ROLES.get(str(turn.get(named)).lower())
        if role is None:
            raise InputError(f"{place}: {named}: {turn.get(named)!r} is not a role; allowed: {', '.join(_ROLES)}")
        content = turn.get("value") if "value" in turn and turn.get("content") is None else turn.get("content")
        if role == "call":
            self._add_calls(place, _called(place, content))
        elif role == "tool":
            content = json.dumps(content, ensure_ascii=False) if isinstance(content, Mapping) else content
            self._add_result(place, turn, _text(place, "content", content))
        else:
            self._add_turn(place, role, turn, _text(place, "content", content))

    def _add_turn(self, place: str, role: str, turn: Mapping[str, Any], content: str) -> None:
        self._open = []
        self.messages.append({"role": role, "content": content})
        calls = turn.get("tool_calls") or ([{"function": turn["function_call"]}] if turn.get("function_call") else None)
        if calls and role == "assistant":
            if not isinstance(calls, list):
                raise InputError(f"{place}: tool_calls: expected a list, found {type(calls).__name__}")
            self._add_calls(place, calls)

    def _add_calls(self, place: str, calls: list[Any]) -> None:
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant":
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        for call in calls:
            self._calls += 1
            read = _call(place, call, self._calls)
            last.setdefault("tool_calls", []).append(read)
            self._open.append((read["id"], read["function"]["name"]))

    def _add_result(self, place: str, turn: Mapping[str, Any], content: str) -> None:
        given = turn.get("tool_call_id")
        matching = [call for call in self._open if given is None or call[0] == given]
        if not matching:
            asked = f"tool_call_id {given!r} names no open call" if given is not None else "it follows no tool call"
            raise InputError(f"{place}: tool result without its call: {asked}; put it right after the turn that calls")
        self._open.remove(matching[0])
        identity, name = matching[0]
        self.messages.append(
            {"role": "tool", "tool_call_id": identity, "name": turn.get("name") or name, "content": content}
        )


def _called(place: str, value: Any) -> list[Any]:
    """The calls of a ShareGPT function_call turn: one, or a list of them."""
    calls = parsed(place, "function_call", value)
    return [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _call(place: str, call: Any, number: int) -> Message:
    """One tool call, its arguments a JSON object written as a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(name, str) and name):
        raise InputError(f"{place}: tool call without a function name: {str(call)[:60]!r}; expected name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(place, f"arguments of {name}", arguments or "{}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise InputError(f"{place}: arguments of {name}: expected a JSON object, found {str(arguments)[:40]!r}")
    written = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": str(call.get("id") or f"call_{number}"),
        "type": "function",
        "function": {"name": name, "arguments": written},
    }


def read_tools(place: str, value: Any) -> str | None:
    """OpenAI's list of tools as a JSON string, from it or from a bare list of functions."""
    tools = parsed(place, "tools", value or [])
    if not isinstance(tools, list):
        raise InputError(f"{place}: tools: expected a list, found {type(tools).__name__}")
    wrapped = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise InputError(f"{place}: tools: expected functions with a name, found {str(tool)[:60]!r}")
        wrapped.append({"type": "function", "function": function})
    return json.dumps(wrapped, ensure_ascii=False) if wrapped else None


def _text(place: str, name: str, content: Any) -> str:
    """A turn's text, from a string, from text parts, or from null."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{place}: {name}: expected text, found {type(content).__name__} {str(content)[:40]!r}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"{place}: {name}: a part of type {found!r}; conversations hold text parts only")
        texts.append(text)
    return "".join(texts)


def parsed(place: str, name: str, value: Any) -> Any:
    """A value that may have been written as a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(f"{place}: {name}: not JSON: {value[:60]!r}") from None
