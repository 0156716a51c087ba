"""Calls of the client's tools as OpenAI streams them: the name of each first, then its arguments as pieces of JSON."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from components.tokenization.chat_tokenizer import ChatTokenizer, read_value

# What may still turn out to be JSON when more of it comes.
_UNDECIDED = re.compile(r"-?\d*(\.\d*)?([eE][+-]?\d*)?[ \t\n\r]*")
_JSON_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


class CallStream:
    """The deltas of a turn's calls as its ids come; all pieces of a call's arguments make one JSON object."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._names = {number: name for name, number in tokenizer.special_ids.items()}
        self._tokenizer = tokenizer
        self._kind, self._text, self._key = "", "", ""
        self._stream = tokenizer.stream()
        self._told: int | None = None
        """Characters of this value that were told as a string; None: it is not certain to be one."""
        self._arguments = 0
        self._read: list[int] = []
        self.ids: list[str] = []
        """Of the calls so far."""

    def push(self, number: int) -> list[dict[str, Any]]:
        """What can be told now."""
        if not self._tokenizer.native:
            return self._whole(number)
        if number not in self._names:
            self._text += self._stream.push(number)
            return self._part() if self._kind == "<|value|>" else []
        self._text += self._stream.flush()
        deltas = self._field()
        self._kind, self._text, self._told, self._stream = self._names[number], "", None, self._tokenizer.stream()
        if self._kind in ("<|call|>", "<|end|>") and self.ids and self._arguments >= 0:
            deltas.append(self._piece("}" if self._arguments else "{}"))
            self._arguments = -1  # this call is whole
        return deltas

    def _whole(self, number: int) -> list[dict[str, Any]]:
        """Calls of another family's format, each when it is whole."""
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
        """What the field that ends here adds."""
        text = self._text.removeprefix(" ")
        if self._kind == "<|call|>":
            self._arguments = 0
            return [self._head(text)]
        if self._kind == "<|argument|>":
            self._key = text
        elif self._kind == "<|value|>" and self.ids:
            if self._told is not None:
                return [self._piece(_inside(text[self._told :]) + '"')]
            return [self._piece(self._opening() + json.dumps(read_value(text), ensure_ascii=False))]
        return []

    def _part(self) -> list[dict[str, Any]]:
        """More of a value that is certain to be a string."""
        text = self._text.removeprefix(" ")
        start = ""
        if self._told is None:
            if not text or text[0] in '"[{' or _UNDECIDED.fullmatch(text) or _begins_word(text) or not self.ids:
                return []
            start, self._told = self._opening() + '"', 0
        new, self._told = text[self._told :], len(text)
        return [self._piece(start + _inside(new))] if start or new else []

    def _opening(self) -> str:
        self._arguments += 1
        return ("{" if self._arguments == 1 else ", ") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _piece(self, text: str) -> dict[str, Any]:
        return {"index": len(self.ids) - 1, "function": {"arguments": text}}


def _begins_word(text: str) -> bool:
    return any(word.startswith(text) for word in _JSON_WORDS)


def _inside(text: str) -> str:
    """A text as it stands within the quotes of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
