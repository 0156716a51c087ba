"""How people put things: wordings from templates, some held out, and what happens to one when it is typed.

A template such as `what (does|can) {x} do` stands for its expansions. A fixed share of them is held out of training,
so that a test asks in words that were never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod

from components.datasets.formats import in_test_split
from examples.stdlib_agent.phrasings import words

HELD_OUT_WORDINGS = 0.2
"""Share of the wordings that training never sees."""
MAX_WEIGHED = 400
"""Expansions of a template that count for how often it is drawn."""

_CHOICE = re.compile(r"\(([^()]*)\)")
_QUOTES = ("'{}'", '"{}"', "`{}`")


class Wordings:
    """The wordings of some templates; without a seed, none is held out."""

    def __init__(self, templates: Sequence[str], seed: int | None) -> None:
        self.seed = seed
        self._templates = [
            [part.split("|") if index % 2 else [part] for index, part in enumerate(_CHOICE.split(template))]
            for template in templates
        ]
        # The root, so that large templates do not drown the small ones.
        sizes = (min(prod(map(len, template)), MAX_WEIGHED) for template in self._templates)
        self._weights = list(accumulate(size**0.5 for size in sizes))

    def pick(self, rng: random.Random, held_out: bool = False) -> str:
        """One of those that training sees, or of those that it never does."""
        while True:
            template = rng.choices(self._templates, cum_weights=self._weights)[0]
            wording = " ".join("".join([rng.choice(choices) for choices in template]).split())
            if self.is_held_out(wording) is held_out:
                return wording

    def is_held_out(self, wording: str) -> bool:
        return self.seed is not None and in_test_split(wording, HELD_OUT_WORDINGS, self.seed)


def quoted(rng: random.Random, name: str) -> str:
    """A name as people write it in a sentence: mostly as it is."""
    return name if rng.random() < 0.55 else rng.choice(_QUOTES).format(name)


def typed(
    rng: random.Random, wording: str, slots: Mapping[str, str], disturbed: bool = False, chat: bool = False
) -> str:
    """A wording as somebody types it: politely or not, with or without capitals and marks, and, disturbed, with a slip.

    `chat` is for sentences that ask for nothing: before or after them goes only what asks for nothing either.
    """
    parts = wording.split(" ")
    ends = _ends(parts)
    if disturbed:
        parts = _disturbed(rng, parts)
    if rng.random() < 0.25:
        parts = [*rng.choice(words("chat_prefixes" if chat else "prefixes")).split(" "), *parts]
    if rng.random() < 0.2:
        parts[-1] += rng.choice((",", ""))
        parts += rng.choice(words("chat_suffixes" if chat else "suffixes")).split(" ")
    text = " ".join(parts)
    if rng.random() < 0.65 and text[0].isalpha():
        text = text[0].upper() + text[1:]
    if rng.random() < 0.8 and "i" in text.lower().split(" "):
        text = re.sub(r"\bi\b", "I", text)
    return text.format(**slots) + rng.choice(ends)


def _ends(parts: Sequence[str]) -> Sequence[str]:
    """Marks that may follow a sentence."""
    if parts[0] in words("asking"):
        return ("?", "?", "?", "")
    indirect = any(part in ("what", "who", "which", "whose", "whom", "how") for part in parts)
    return ("?", ".", "", "") if indirect else (".", "", "", "!")


def _disturbed(rng: random.Random, parts: list[str]) -> list[str]:
    """One slip: a filler put in, a small word dropped, or a word mistyped."""
    plain = [index for index, part in enumerate(parts) if "{" not in part]
    small = [index for index in plain if parts[index] in words("droppable")]
    slip = rng.random()
    if slip < 0.3 and small and len(parts) > 2:
        dropped = rng.choice(small)
        return parts[:dropped] + parts[dropped + 1 :]
    if slip < 0.55 and plain:
        index = rng.choice(plain)
        return [*parts[:index], _mistyped(rng, parts[index]), *parts[index + 1 :]]
    index = rng.randrange(len(parts) + 1)
    return [*parts[:index], *rng.choice(words("fillers")).split(" "), *parts[index:]]


def _mistyped(rng: random.Random, word: str) -> str:
    """Two neighbouring letters exchanged, or one lost; never the first or last."""
    if len(word) < 4:
        return word
    at = rng.randrange(1, len(word) - 2)
    swapped = word[at + 1] + word[at] if rng.random() < 0.5 else word[at + 1]
    return word[:at] + swapped + word[at + 2 :]
