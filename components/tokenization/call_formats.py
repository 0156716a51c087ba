"""Tool calls as other model families write them: JSON objects, alone or between marks.

A tokenizer's template shows its format by writing a call (`detect_format`); by it turns are parsed, streamed and
constrained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from components.tokenization.tool_calls import Call, Turn, finite, integer

CALL_MARKS: Mapping[str, tuple[str, str]] = {
    "Hermes and Qwen": ("<tool_call>", "</tool_call>"),
    "Phi": ("<|tool_call|>", "<|/tool_call|>"),
    "Mistral": ("[TOOL_CALLS]", ""),
    "Gemma": ("```tool_code", "\n```"),
}
"""What stands before and behind the calls of a turn; a family without marks, such as Llama, writes one call alone."""
PYTHON_TAG = "<|python_tag|>"
"""What Llama may write before a call, whatever its template does."""
_JSON = json.JSONDecoder(parse_float=finite, parse_int=integer)

PROBE = Call("probe", {"key": "value"})
"""The call by which a template shows its format."""


@dataclass(frozen=True)
class CallFormat:
    """How another family writes its calls: JSON objects, between marks or alone. The default is Llama's."""

    open: str = ""
    """The mark before the calls; empty: a turn of one object is a call."""
    close: str = ""
    """The mark behind them; empty: none but the turn's end."""
    before: str = ""
    """Text from the opening mark to the first object."""
    between: str | None = None
    """Text between two objects; None: a turn has one call."""
    after: str = ""
    """Text behind the last object, the closing mark included."""
    keys: tuple[str, ...] = ("name", "parameters")
    """Keys of an object, in order."""

    @cached_property
    def marked(self) -> re.Pattern[str]:
        """The calls of a turn, with their marks; what is cut off ends with the turn."""
        ends = f"(?:{re.escape(self.close)}|\\Z)" if self.close else r"\Z"
        return re.compile(f"{re.escape(self.open)}(.*?){ends}" if self.open else r"(?!)()", re.DOTALL)

    @cached_property
    def head(self) -> re.Pattern[str]:
        """A call up to its arguments."""
        first = re.escape(self.open) if self.open else rf"\A\s*(?:{re.escape(PYTHON_TAG)})?"
        return re.compile(
            rf'(?:{first}|[,;])[\s\[]*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
        )


BARE = CallFormat()


def detect_format(single: str, double: str | None) -> CallFormat | None:
    """The format of a turn with the call `PROBE` and of one with that call twice; None where there is no such call.

    `double` is None where the template refuses several calls.
    """
    calls, pair = list(_probes(single)), list(_probes(double or ""))
    if len(calls) != 1:
        return None
    start, stop, keys = calls[0]
    opened, close = next((marks for marks in CALL_MARKS.values() if marks[0] in single[:start]), ("", ""))
    if set(keys) - {"name", "arguments", "parameters", "id"} or not (
        opened or single[:start].strip() in ("", PYTHON_TAG)
    ):
        return None
    tail = single[stop:]
    return CallFormat(
        opened,
        close if close in tail else "",
        single[single.rfind(opened, 0, start) : start] if opened else "",
        (double or "")[pair[0][1] : pair[1][0]] if opened and len(pair) == 2 else None,
        tail[: tail.find(close) + len(close)] if close and close in tail else tail.rstrip(),
        keys,
    )


def _probes(text: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Start, stop and keys of each object that is the call `PROBE`."""
    position = text.find("{")
    while position >= 0:
        stop = position + 1
        try:
            value, after = _JSON.raw_decode(text, position)
        except ValueError:
            value = None
        if isinstance(value, dict) and _call(value) == PROBE:
            yield position, after, tuple(value)
            stop = after
        position = text.find("{", stop)


def parse_json_calls(text: str, form: CallFormat = BARE) -> Turn:
    """A turn of another family: text with calls between marks, or one call and nothing else."""
    pieces = form.marked.split(text)
    if len(pieces) > 1:
        marked = tuple(call for piece in pieces[1::2] for call in _read_calls(piece)[0])
        return Turn("".join(pieces[::2]).strip(), marked)
    alone = text.strip().removeprefix(PYTHON_TAG).lstrip()
    calls, whole = _read_calls(alone) if alone.startswith("{") else ([], False)
    return Turn("", tuple(calls)) if whole and calls else Turn(text.removeprefix(" "))


class CallTextFilter:
    """Withholds from a turn's streamed text what is, or may become, a call that `parse_json_calls` reads.

    The pieces that it passes, joined, are the content of that turn.
    """

    def __init__(self, form: CallFormat = BARE) -> None:
        self._form = form
        self._held, self._space = "", ""
        self._opened, self._called, self._passed = False, False, False

    def push(self, text: str) -> str:
        """The text that is certain to be words after this piece."""
        self._held += text
        if not self._opened and self._held.lstrip()[:1] in ("", "{"):
            return ""  # the whole turn may be one call
        self._opened = True
        mark, close, words = self._form.open, self._form.close, ""
        while mark and (position := self._held.find(mark)) >= 0:
            words += self._words(self._held[:position])
            stop = self._held.find(close, position + len(mark)) if close else -1
            self._called = self._called or stop >= 0
            self._held = self._held[position:] if stop < 0 else self._held[stop + len(close) :]
            if stop < 0:
                return words
        # The last characters may begin a mark.
        begun = next((size for size in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:size])), 0)
        position = len(self._held) - begun
        words += self._words(self._held[:position])
        self._held = self._held[position:]
        return words

    def flush(self) -> str:
        """The rest at the end of the turn."""
        held, self._held = self._held, ""
        if not self._opened:
            return parse_json_calls(held, self._form).content
        cut_off = bool(self._form.open) and held.startswith(self._form.open)  # such a call is no text either
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


def _read_calls(text: str) -> tuple[list[Call], bool]:
    """The calls of JSON objects or lists of them, one behind the other, and whether the text is nothing else."""
    text, position, calls = text.strip(), 0, list[Call]()
    while position < len(text):
        try:
            value, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError):
            return calls, False
        for item in value if isinstance(value, list) else [value]:
            if (call := _call(item)) is None:
                return calls, False
            calls.append(call)
        position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n,;"))
    return calls, True


def _call(value: Any) -> Call | None:
    """A call in JSON: `{"name": ..., "arguments": {...}}`, or with `parameters` as Llama has it."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return Call(value["name"], arguments) if isinstance(arguments, dict) else None
