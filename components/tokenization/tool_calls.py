"""Tool calls in the formats of models: parsing a turn, the rule for arguments, and OpenAI's streaming deltas.

Our own chat template writes `<|call|> name<|argument|> key<|value|> value`, each argument as raw text, spelled as in
the user's message, unless that text could be read as JSON: then it is written as JSON. Other families write the whole
call as JSON (`call_formats.py`). `components/agent/turn_grammar.py` constrains a model to either.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# Prefixes of JSON numbers: more text decides.
_UNDECIDED = re.compile(r"-?\d*(\.\d*)?([eE][+-]?\d*)?[ \t\n\r]*")
_JSON_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Call:
    """One tool call of the model."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One assistant turn: text, calls, or both."""

    content: str
    calls: tuple[Call, ...] = ()


def new_call_id(_call: Call) -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


def openai_call(call: Call, number: str) -> dict[str, Any]:
    """A call in the shape of OpenAI's chat API."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": number, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def parse_fields(fields: Iterable[tuple[str, str]]) -> Turn:
    """A turn of our own template from `(special token, the text after it)`; the first has no token before it."""
    content, calls, key = "", list[Call](), ""
    for kind, text in fields:
        if kind == "":
            content += text
        elif kind == "<|call|>":
            calls.append(Call(text, {}))
        elif kind == "<|argument|>":
            key = text
        elif kind == "<|value|>" and calls:
            calls[-1].arguments[key] = read_value(text)
    return Turn(content, tuple(calls))


def stands_bare(text: str) -> bool:
    """Whether the template writes this string unquoted: it cannot be read as JSON."""
    return text[:1] not in ("", *'"[{ \n\t\r') and text not in ("true", "false", "null") and not _is_number(text)


def read_value(text: str) -> Any:
    """The inverse of the template's rule for argument values."""
    if text[:1] in ('"', "[", "{") or text in ("true", "false", "null") or _is_number(text):
        try:
            return json.loads(text, parse_float=finite, parse_int=integer)
        except ValueError:
            return text
    return text


def finite(text: str) -> float:
    """A number, at most the largest float: infinity is no JSON."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def integer(text: str) -> int:
    """An integer of any length; as a float where it has more digits than Python reads."""
    return int(text) if len(text) <= sys.int_info.default_max_str_digits else int(finite(text))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Stream(Protocol):
    """Ids in, whole characters out."""

    def push(self, number: int) -> str: ...

    def flush(self) -> str: ...


class JsonCalls(Protocol):
    """The part of `CallFormat` that the deltas need."""

    @property
    def head(self) -> re.Pattern[str]: ...


class Tokenizer(Protocol):
    """The part of `ChatTokenizer` that the deltas need."""

    native: bool

    @property
    def call_format(self) -> JsonCalls: ...

    @property
    def special_ids(self) -> Mapping[str, int]: ...

    def stream(self) -> Stream: ...

    def parse_turn(self, ids: Iterable[int]) -> Turn: ...


class ToolCallDeltaParser:
    """The deltas of a turn's calls, id by id; the pieces of a call's arguments make one JSON object."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._names = {number: name for name, number in tokenizer.special_ids.items()}
        self._tokenizer = tokenizer
        self._kind, self._text, self._key = "", "", ""
        self._stream = tokenizer.stream()
        self._emitted: int | None = None
        """Characters of this value that were emitted as a string; None: it is not certain to be one."""
        self._arguments = 0
        self._read: list[int] = []
        self._place = 0
        """Characters of another family's turn that are read."""
        self._object: _ObjectEnd | None = None
        """Of the arguments that are being written."""
        self.ids: list[str] = []
        """Of the calls so far."""

    def push(self, number: int) -> list[dict[str, Any]]:
        """The deltas that this id completes."""
        if not self._tokenizer.native:
            return self._json(number)
        if number not in self._names:
            self._text += self._stream.push(number)
            return self._part() if self._kind == "<|value|>" else []
        self._text += self._stream.flush()
        deltas = self._field()
        self._kind, self._text, self._emitted, self._stream = self._names[number], "", None, self._tokenizer.stream()
        if self._kind in ("<|call|>", "<|end|>") and self.ids and self._arguments >= 0:
            deltas.append(self._piece("}" if self._arguments else "{}"))
            self._arguments = -1  # this call is complete
        return deltas

    def _json(self, number: int) -> list[dict[str, Any]]:
        """Deltas of calls in JSON: a call's name, then the text of its arguments as it comes."""
        self._read.append(number)
        if number not in self._names:
            self._text += self._stream.push(number)
        else:
            self._text += self._stream.flush() + self._names[number]
            self._stream = self._tokenizer.stream()
        deltas: list[dict[str, Any]] = []
        while True:
            if self._object is None:
                head = self._tokenizer.call_format.head.search(self._text, self._place)
                if head is None:
                    break
                deltas.append(self._head(json.loads(head[1])))
                self._object, self._place = _ObjectEnd(), head.end()
            stop, closed = self._object.find(self._text, self._place)
            if stop > self._place:
                deltas.append(self._piece(self._text[self._place : stop]))
            self._place = stop
            if not closed:
                break
            self._object = None
        if number in self._names and self._object is None:
            for call in self._tokenizer.parse_turn(self._read).calls[len(self.ids) :]:  # written in another way
                deltas += [self._head(call.name), self._piece(json.dumps(call.arguments, ensure_ascii=False))]
        return deltas

    def _head(self, name: str) -> dict[str, Any]:
        """The first delta of a new call."""
        self.ids.append(f"call_{uuid.uuid4().hex[:24]}")
        function = {"name": name, "arguments": ""}
        return {"index": len(self.ids) - 1, "id": self.ids[-1], "type": "function", "function": function}

    def _field(self) -> list[dict[str, Any]]:
        """The deltas of the field that ends here."""
        text = self._text.removeprefix(" ")
        if self._kind == "<|call|>":
            self._arguments = 0
            return [self._head(text)]
        if self._kind == "<|argument|>":
            self._key = text
        elif self._kind == "<|value|>" and self.ids:
            if self._emitted is not None:
                return [self._piece(_inside(text[self._emitted :]) + '"')]
            return [self._piece(self._opening() + json.dumps(read_value(text), ensure_ascii=False))]
        return []

    def _part(self) -> list[dict[str, Any]]:
        """The delta of a value that is certain to be a string."""
        text = self._text.removeprefix(" ")
        start = ""
        if self._emitted is None:
            if not text or text[0] in '"[{' or _UNDECIDED.fullmatch(text) or _begins_word(text) or not self.ids:
                return []
            start, self._emitted = self._opening() + '"', 0
        new, self._emitted = text[self._emitted :], len(text)
        return [self._piece(start + _inside(new))] if start or new else []

    def _opening(self) -> str:
        self._arguments += 1
        return ("{" if self._arguments == 1 else ", ") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _piece(self, text: str) -> dict[str, Any]:
        return {"index": len(self.ids) - 1, "function": {"arguments": text}}


def _begins_word(text: str) -> bool:
    return any(word.startswith(text) for word in _JSON_WORDS)


def _inside(text: str) -> str:
    """A text as JSON, without its quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def find(self, text: str, start: int) -> tuple[int, bool]:
        """Where the object, or the text, ends behind `start`, and whether it is the object."""
        for index in range(start, len(text)):
            character = text[index]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{}":
                self._depth += 1 if character == "{" else -1
                if not self._depth:
                    return index + 1, True
        return len(text), False
