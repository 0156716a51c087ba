"""Tool calls in the formats of models: parsing a turn, the rule for arguments, and OpenAI's streaming deltas.

Our own chat template writes `<|call|> name<|argument|> key<|value|> value`, each argument as raw text, spelled as in
the user's message, unless that text could be read as JSON: then it is written as JSON. Hermes, Qwen and Llama write
the whole call as JSON. `components/agent/turn_grammar.py` constrains a model to either.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

CALL_MARKS = ("<tool_call>", "</tool_call>")
"""Tokens around a call in the format of Hermes and Qwen."""
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
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


def parse_json_calls(text: str) -> Turn:
    """A turn of another family: text with calls between marks, or one call and nothing else."""
    pieces = _CALL.split(text)
    marked = pieces[1::2]
    calls = [call for piece in marked if (call := _read_call(piece)) is not None]
    if not marked and (call := _read_call(text)) is not None:
        return Turn("", (call,))
    return Turn("".join(pieces[::2]).strip() if marked else text.removeprefix(" "), tuple(calls))


class CallTextFilter:
    """Withholds from a turn's streamed text what is, or may become, a call that `parse_json_calls` reads.

    The pieces that it passes, joined, are the content of that turn.
    """

    def __init__(self) -> None:
        self._held, self._space = "", ""
        self._opened, self._called, self._passed = False, False, False

    def push(self, text: str) -> str:
        """The text that is certain to be words after this piece."""
        self._held += text
        if not self._opened and self._held.lstrip()[:1] in ("", "{"):
            return ""  # the whole turn may be one call
        self._opened = True
        mark, words = CALL_MARKS[0], ""
        while (place := self._held.find(mark)) >= 0:
            words += self._words(self._held[:place])
            stop = self._held.find(CALL_MARKS[1], place)
            self._called = self._called or stop >= 0
            self._held = self._held[place:] if stop < 0 else self._held[stop + len(CALL_MARKS[1]) :]
            if stop < 0:
                return words
        # The last characters may begin a mark.
        begun = next(size for size in range(len(mark) - 1, -1, -1) if self._held.endswith(mark[:size]))
        place = len(self._held) - begun
        words += self._words(self._held[:place])
        self._held = self._held[place:]
        return words

    def flush(self) -> str:
        """The rest at the end of the turn."""
        held, self._held = self._held, ""
        if not self._opened:
            return parse_json_calls(held).content
        cut_off = held.startswith(CALL_MARKS[0])  # such a call is no text either
        words = "" if cut_off else self._words(held)
        return words if self._called or cut_off else words + self._space

    def _words(self, text: str) -> str:
        """Words, behind the whitespace that waited for them; beside calls none begins or ends the content."""
        text = self._space + text
        words = text.rstrip()
        self._space = text[len(words) :]
        if self._called and not self._passed:
            words = words.lstrip()
        self._passed = self._passed or bool(words)
        return words


def _read_call(text: str) -> Call | None:
    """A call written as JSON: `{"name": ..., "arguments": {...}}`, or with `parameters` as Llama has it."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return Call(value["name"], arguments) if isinstance(arguments, dict) else None


def stands_bare(text: str) -> bool:
    """Whether the template writes this string unquoted: it cannot be read as JSON."""
    return text[:1] not in ("", *'"[{ \n\t\r') and text not in ("true", "false", "null") and not _is_number(text)


def read_value(text: str) -> Any:
    """The inverse of the template's rule for argument values."""
    if text[:1] in ('"', "[", "{") or text in ("true", "false", "null") or _is_number(text):
        try:
            return json.loads(text, parse_float=_finite, parse_int=_integer)
        except ValueError:
            return text
    return text


def _finite(text: str) -> float:
    """A number, at most the largest float: infinity is no JSON."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def _integer(text: str) -> int:
    """An integer of any length; as a float where it has more digits than Python reads."""
    return int(text) if len(text) <= sys.int_info.default_max_str_digits else int(_finite(text))


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


class Tokenizer(Protocol):
    """The part of `ChatTokenizer` that the deltas need."""

    native: bool

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
        self.ids: list[str] = []
        """Of the calls so far."""

    def push(self, number: int) -> list[dict[str, Any]]:
        """The deltas that this id completes."""
        if not self._tokenizer.native:
            return self._whole(number)
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

    def _whole(self, number: int) -> list[dict[str, Any]]:
        """Calls of another family's format, each when it is complete."""
        self._read.append(number)
        if number not in self._names:
            return []
        calls = self._tokenizer.parse_turn(self._read).calls[len(self.ids) :]
        return [
            delta
            for call in calls
            for delta in (self._head(call.name), self._piece(json.dumps(call.arguments, ensure_ascii=False)))
        ]

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
