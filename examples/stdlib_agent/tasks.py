"""A summary turned into what somebody would search for: `Return the sine of x.` → `return the sine of x`."""

from __future__ import annotations

from functools import cache

from examples.stdlib_agent.phrasings import words
from examples.stdlib_agent.stdlib import Symbol

MAX_WORDS = 14
MAX_SUBJECT = 7
_JOINING = ("and", "or", "then")
_ARTICLES = frozenset({"a", "an", "the", "all", "each", "this", "any", "its", "every"})
_ENDING = frozenset(
    {"if", "when", "whether", "so", "but", "else", "otherwise", "otherwise,", "until", "unless", "where"}
)
_LINKING = _ARTICLES | {
    "of",
    "in",
    "from",
    "for",
    "with",
    "to",
    "by",
    "on",
    "at",
    "into",
    "as",
    "and",
    "or",
    "than",
    "is",
}


def task(symbol: Symbol) -> str:
    """What a function or method does, as a verb phrase in lower case; empty where its summary is no such phrase."""
    short = 3 <= len(symbol.summary.split()) <= MAX_WORDS
    return as_task(symbol.summary) if short and symbol.kind in ("function", "method") else ""


def as_task(summary: str) -> str:
    first, *rest = summary.rstrip(".!?").split()
    verb = _imperative(first.lower())
    return " ".join([verb, *rest]) if verb else ""


def about(sentence: str) -> str:
    """What a verb phrase is about, in a few words: `find the n largest elements, sorted` → `n largest elements`."""
    parts = sentence.split()[1:]
    while len(parts) > 2 and parts[0] in _JOINING:
        parts = parts[2:]
    if parts[0] in ("True", "False"):
        return ""
    ends = (index for index, part in enumerate(parts) if index and (part in _ENDING or part[0] == "("))
    subject = parts[: next(ends, len(parts))]
    comma = next((index + 1 for index, part in enumerate(subject) if part[-1] in ",;:"), len(subject))
    subject = subject[:comma]
    if len(subject) > MAX_SUBJECT:
        links = [index for index, part in enumerate(subject[:MAX_SUBJECT]) if index > 1 and part in _LINKING]
        subject = subject[: links[-1] if links else MAX_SUBJECT]
    while subject and (subject[0] in _ARTICLES or subject[0] in _ENDING):
        subject = subject[1:]
    while subject and subject[-1] in _LINKING:
        subject = subject[:-1]
    return " ".join(subject).strip(",;:()[]")


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
