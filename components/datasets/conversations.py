"""Conversations in the formats of others, as messages of OpenAI's chat API.

Formats: OpenAI `messages`, ShareGPT `conversations` (from/value, function_call, observation), Alpaca
`instruction`/`input`/`output` and TRL `prompt`/`completion`. Errors name the location.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.config.params import InputError
from components.datasets.records import decode_json

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "gpt4": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "gemini": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
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
"""Names of roles in other formats; `call` is an assistant's turn that holds tool calls alone."""


_TURNS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "prompt", "question")
PROMPTS = ("prompt", *_TURNS, *_QUESTIONS)
_ANSWERS = ("output", "completion", "response")
_REJECTED = ("rejected", "non_preferred_output", "rejected_response")
_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")


def named_roles(pairs: Sequence[str]) -> dict[str, str]:
    """`ROLES` with those of `NAME=ROLE` pairs."""
    roles = dict(ROLES)
    for pair in pairs:
        name, _, role = pair.rpartition("=")
        if not name or role not in ROLES:
            raise InputError(f"--role: {pair!r} is not NAME=ROLE; allowed roles: {', '.join(ROLES)}")
        roles[name.lower()] = ROLES[role]
    return roles


def read_conversation(
    location: str, values: Mapping[str, Any], roles: Mapping[str, str] = ROLES
) -> tuple[list[Message], str | None]:
    """(messages, tools as a JSON string or None) of one record.

    Raises: InputError naming the location and the reason.
    """
    rejected = first_of(values, _REJECTED)
    label = next((name for name in ("label", "kto_tag") if isinstance(values.get(name), bool)), None)
    if rejected or label:
        columns = f'the boolean "{label}"' if label else f'"chosen" and "{rejected}"'
        raise InputError(f"{location}: found {columns}: rated answers are of kind preferences, not conversations")
    turns = turns_of(location, values)
    messages = read_messages(location, turns, roles=roles)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{location}: no assistant turn among {len(messages)}; there is nothing to learn from")
    _refuse_untrained(location, turns, roles)
    return messages, read_tools(location, values.get("tools") or values.get("functions"))


def _refuse_untrained(location: str, turns: Sequence[Mapping[str, Any]], roles: Mapping[str, str]) -> None:
    """Refuse turns of the assistant that are marked as not to be trained on."""
    for number, turn in enumerate(turns, 1):
        marked = next((name for name in ("weight", "train", "training") if turn.get(name) not in (None, 1)), None)
        if marked and role_of(turn, roles) in ("assistant", "call"):
            raise InputError(
                f"{location}: turn {number}: {marked}: {turn[marked]!r}: the assistant's turns are all trained on, "
                "and alike; remove the turn and those after it, or the mark"
            )


def read_messages(
    location: str, turns: Sequence[Any], before: Sequence[Any] = (), roles: Mapping[str, str] = ROLES
) -> list[Message]:
    """Messages of the turns, which may answer tool calls of the turns `before`."""
    builder = _MessageBuilder(location, roles)
    for number, turn in enumerate(before, 1):
        builder.push(number, turn)
    count = len(builder.messages)
    for number, turn in enumerate(turns, 1):
        builder.push(number, turn)
    return builder.messages[count:]


def first_of(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these columns that has a value."""
    return next((name for name in names if values.get(name) is not None), None)


def turns_of(location: str, values: Mapping[str, Any]) -> list[Any]:
    """The turns of one record, in its own format."""
    if first_of(values, _TURNS):
        return question_of(location, values, _TURNS)
    answer = first_of(values, _ANSWERS)
    if not answer or not first_of(values, _QUESTIONS):
        raise InputError(
            f"{location}: no conversation; found columns: {', '.join(values) or 'none'}; expected "
            '"messages" (OpenAI), "conversations" (ShareGPT), "instruction" with "output" (Alpaca) '
            'or "prompt" with "completion" (TRL)'
        )
    question = question_of(location, values, _QUESTIONS)
    return [*question, *written_turns(f"{location}: {answer}", values[answer], "assistant")]


def question_of(location: str, values: Mapping[str, Any], names: Sequence[str] = PROMPTS) -> list[Any]:
    """The turns in the first of these columns that has a value, after `system` and `history`; without one, none.

    A text is a turn of the user; `input` follows it in a paragraph of its own.
    """
    name = first_of(values, names)
    if name is None:
        return []
    if name in _TURNS:
        prompt = parsed(location, name, values[name])
        if not isinstance(prompt, list):
            raise InputError(f"{location}: {name}: expected a list of turns, found {type(prompt).__name__}")
    elif name == "prompt":
        prompt = written_turns(f"{location}: {name}", values[name], "user")
    else:
        parts = [_text(location, part, values.get(part)) for part in (name, "input")]
        prompt = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    turns = [{"role": "system", "content": values["system"]}] if values.get("system") else []
    for pair in (values.get("history") or []) if name not in _TURNS else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{location}: history: expected pairs of question and answer, found {str(pair)[:40]!r}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*turns, *prompt]


def written_turns(location: str, value: Any, role: str) -> list[Any]:
    """The turns of a text, a turn or a list of turns; a text by itself is a turn of `role`."""
    value = _turns_in(value) if isinstance(value, str) else value
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise InputError(f"{location}: expected text, a turn or a list of turns, found {type(value).__name__}")
    return value


def _turns_in(text: str) -> Any:
    """The turns of a text that is JSON or a dialogue of "Human:" and "Assistant:"; else the text itself."""
    if _DIALOGUE.match(text):
        _, *parts = _DIALOGUE.split(text)
        return [
            {"role": role, "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
        ]
    if not (text[:1] in "[{" and text.strip()[-1:] in ("]", "}")):
        return text
    try:
        value = decode_json(text)
    except (ValueError, RecursionError):
        return text
    turns = value if isinstance(value, list) else [value]
    are_turns = all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns)
    return value if turns and are_turns else text


def role_of(turn: Mapping[str, Any], roles: Mapping[str, str]) -> str | None:
    """The role of a turn, or `call`; None for a name that stands for none."""
    return roles.get(str(turn["from"] if turn.get("from") is not None else turn.get("role")).lower())


def content_of(turn: Mapping[str, Any]) -> Any:
    """What a turn says: its `content`, or in ShareGPT's format its `value`."""
    return turn.get("value") if "value" in turn and turn.get("content") is None else turn.get("content")


class _MessageBuilder:
    """Builds messages from turns in order: joins calls to their turn and results to their calls."""

    def __init__(self, location: str, roles: Mapping[str, str]) -> None:
        self.messages: list[Message] = []
        self._place = location
        self._roles = roles
        self._calls = 0
        self._open: list[tuple[str, str]] = []  # (id, name) of calls without a result yet

    def push(self, number: int, turn: Any) -> None:
        location = f"{self._place}: turn {number}"
        if not isinstance(turn, Mapping):
            raise InputError(f"{location}: expected an object with role and content, found {type(turn).__name__}")
        role = role_of(turn, self._roles)
        if role is None:
            key = "from" if turn.get("from") is not None else "role"
            raise InputError(
                f"{location}: {key}: {turn.get(key)!r} is not a role; allowed: {', '.join(self._roles)}; "
                "name another with --role NAME=ROLE"
            )
        content = content_of(turn)
        if role == "call":
            self._add_calls(location, _function_calls(location, content))
        elif role == "tool":
            content = _dumped(location, "content", content) if isinstance(content, Mapping) else content
            self._add_result(location, turn, _text(location, "content", content))
        else:
            self._add_turn(location, role, turn, _text(location, "content", content))

    def _add_turn(self, location: str, role: str, turn: Mapping[str, Any], content: str) -> None:
        self._open = []
        self.messages.append({"role": role, "content": content})
        calls = turn.get("tool_calls") or ([{"function": turn["function_call"]}] if turn.get("function_call") else None)
        if calls and role == "assistant":
            if not isinstance(calls, list):
                raise InputError(f"{location}: tool_calls: expected a list, found {type(calls).__name__}")
            self._add_calls(location, calls)

    def _add_calls(self, location: str, calls: list[Any]) -> None:
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant":
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        for call in calls:
            self._calls += 1
            read = _call(location, call, self._calls)
            last.setdefault("tool_calls", []).append(read)
            self._open.append((read["id"], read["function"]["name"]))

    def _add_result(self, location: str, turn: Mapping[str, Any], content: str) -> None:
        call_id = turn.get("tool_call_id")
        matching = [call for call in self._open if call_id is None or call[0] == call_id]
        if not matching:
            reason = (
                f"tool_call_id {call_id!r} names no open call" if call_id is not None else "it follows no tool call"
            )
            raise InputError(
                f"{location}: tool result without its call: {reason}; put it right after the turn that calls"
            )
        self._open.remove(matching[0])
        identity, name = matching[0]
        self.messages.append(
            {"role": "tool", "tool_call_id": identity, "name": turn.get("name") or name, "content": content}
        )


def _function_calls(location: str, value: Any) -> list[Any]:
    """The calls of a ShareGPT function_call turn: a call, or a list of calls."""
    calls = parsed(location, "function_call", value)
    return [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _call(location: str, call: Any, number: int) -> Message:
    """One tool call, its arguments a JSON object written as a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(name, str) and name):
        raise InputError(
            f"{location}: tool call without a function name: {str(call)[:60]!r}; expected name and arguments"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(location, f"arguments of {name}", arguments or "{}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise InputError(f"{location}: arguments of {name}: expected a JSON object, found {str(arguments)[:40]!r}")
    written = _dumped(location, f"arguments of {name}", arguments)
    return {
        "id": str(call.get("id") or f"call_{number}"),
        "type": "function",
        "function": {"name": name, "arguments": written},
    }


def read_tools(location: str, value: Any) -> str | None:
    """OpenAI's list of tools, or a bare list of functions, as a JSON string of the former."""
    tools = parsed(location, "tools", value or [])
    if not isinstance(tools, list):
        raise InputError(f"{location}: tools: expected a list, found {type(tools).__name__}")
    wrapped = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise InputError(f"{location}: tools: expected functions with a name, found {str(tool)[:60]!r}")
        wrapped.append({"type": "function", "function": function})
    return _dumped(location, "tools", wrapped) if wrapped else None


def _dumped(location: str, name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{location}: {name}: cannot be written as JSON: {error}") from None


def _text(location: str, name: str, content: Any) -> str:
    """A turn's text, from a string, from text parts, or from null."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{location}: {name}: expected text, found {type(content).__name__} {str(content)[:40]!r}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"{location}: {name}: a part of type {kind!r}; conversations hold text parts only")
        texts.append(text)
    return "".join(texts)


def parsed(location: str, name: str, value: Any) -> Any:
    """The value, decoded if it is a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)
    except (ValueError, RecursionError):
        raise InputError(f"{location}: {name}: not JSON: {value[:60]!r}") from None
