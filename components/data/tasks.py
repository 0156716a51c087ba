"""A summary turned into what somebody would search for: `Return the sine of x.` → `return the sine of x`."""

from __future__ import annotations

from functools import cache

from components.data.phrasings import words
from components.data.stdlib import Symbol

MAX_WORDS = 14


def task(symbol: Symbol) -> str:
    """What a function or method does, as a verb phrase in lower case; empty where its summary is no such phrase."""
    return as_task(symbol.summary) if symbol.kind in ("function", "method") else ""


def as_task(summary: str) -> str:
    words = summary.rstrip(".!?").split()
    if not 3 <= len(words) <= MAX_WORDS:
        return ""
    verb = _imperative(words[0].lower())
    return " ".join([verb, *words[1:]]) if verb else ""


def about(wanted: str) -> str:
    """The object of a verb phrase: `find the n largest elements` → `the n largest elements`."""
    return wanted.partition(" ")[2]


def _imperative(word: str) -> str:
    known = _imperatives()
    if word in known:
        return word
    for ending in ("es", "s"):
        if word.endswith(ending) and word.removesuffix(ending) in known:
            return word.removesuffix(ending)
    return ""


@cache
def _imperatives() -> frozenset[str]:
    return frozenset(words("verbs") + words("more_verbs"))
