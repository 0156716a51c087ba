"""A docstring's first sentence as one short plain line: what `lookup` answers with."""

from __future__ import annotations

import inspect
import re

MAX_SUMMARY = 90
"""Characters; a small model copies a line of this length without slips."""

_SIGNATURE = re.compile(r"^[\w.\[\]]+\(.*\)\s*(?:-+>\s*(?P<returns>.*))?$")
_SIGNATURE_DASH = re.compile(r"^[\w.]+\([^()]*(?:\([^()]*\)[^()]*)*\)\s+--?\s+(?P<text>\S.*)$")
_AFTER_RETURNS = re.compile(r"^(?:[\w ,()\[\]]*\.\s+|[\w ,()\[\]]*\s--?\s+)(?P<text>\S.*)$")
# `int, int -> Construct a date`, `v, remove the key`: what C docstrings say of types before the sentence.
_TYPES_FIRST = re.compile(r"^(?:[\w,. \[\]]{1,40}? -+> (?=\w+ \w)|[a-z], )")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)[.!?](?=\s+[A-Z`'\"(<*\[]|$)")
_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r":[a-z:]+:`[~!]?([^`]+)`"), r"\1"),
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^`']+)[`']"), r"\1"),
    (re.compile(r"(?<!\w)\*(\w+)\*(?!\w)"), r"\1"),
    (re.compile(r"\s+"), " "),
)
_LISTING = re.compile(r"[:;,]$")


def summary(docstring: str) -> str:
    """The first sentence, cleaned, ending in a full stop; empty when there is none that is short and plain."""
    sentence = first_sentence(docstring)
    plain = len(sentence) <= MAX_SUMMARY and sentence.isascii() and len(sentence.split()) > 1
    return sentence if plain and sentence[0].isalnum() and ">>>" not in sentence else ""


def shortened(docstring: str) -> str:
    """Like `summary`, but a long sentence is cut at a word instead of refused."""
    sentence = first_sentence(docstring)
    if len(sentence) <= MAX_SUMMARY:
        return sentence
    return sentence[: MAX_SUMMARY - 3].rsplit(" ", 1)[0].rstrip(" ,;:.") + "..."


def first_sentence(docstring: str) -> str:
    """One line of any length, without markup and without the signature that C docstrings start with."""
    text = _prose(inspect.cleandoc(docstring))
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = _TYPES_FIRST.sub("", text.strip())
    end = _SENTENCE_END.search(text)
    text = (text[: end.end()] if end else text).strip()
    text = _LISTING.sub("", text).strip()
    if re.match(r"[a-z]+ ", text):
        text = text[0].upper() + text[1:]
    return text if not text or text[-1] in ".!?" else text + "."


def _prose(docstring: str) -> str:
    """The first paragraph that is not a signature."""
    lines = docstring.split("\n")
    while lines:
        if dash := _SIGNATURE_DASH.match(lines[0].strip()):
            lines[0] = dash["text"]
            break
        match = _SIGNATURE.match(lines[0].strip())
        if not match:
            break
        returns = match["returns"] or ""
        text = _AFTER_RETURNS.match(returns)
        if text:
            lines[0] = text["text"]
            break
        if len(returns.split()) > 2:
            return returns
        del lines[0]
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            break
    # A heading and its underline are not a sentence.
    return " ".join(line for line in paragraph if not re.fullmatch(r"[=\-~^*#]{3,}", line))
