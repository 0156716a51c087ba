"""The words of an answer as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from components.tokenization.chat_tokenizer import ChatTokenizer


class Speech:
    """The words of one turn as its ids come: whole characters, no call, nothing from a stop string on."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = tokenizer.stream()
        self._held = ""
        """Could be the beginning of a stop string."""
        self._first = self._speaking = True
        self.stopped = False

    def push(self, number: int) -> str:
        """Text that is now certain to belong to the answer."""
        if not self._speaking:
            return ""
        if not self._tokenizer.token_bytes(number):  # a special token: what follows are calls, or nothing
            return self.flush()
        return self._certain(self._stream.push(number))

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        if not self._speaking:
            return ""
        text = self._certain(self._stream.flush())
        self._speaking = False
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _certain(self, text: str) -> str:
        if self._first and text:
            self._first, text = False, text.removeprefix(" ")  # the template's space before all text
        text = self._held + text
        cut = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self.stopped, self._speaking, self._held = True, False, ""
            return text[:cut]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
