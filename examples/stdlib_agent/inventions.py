"""Made-up names and sentences: where a name means nothing, an argument or an answer can only be copied."""

from __future__ import annotations

import random
from collections.abc import Sequence

from examples.stdlib_agent.phrasings import words
from examples.stdlib_agent.summaries import MAX_SUMMARY


def word(rng: random.Random) -> str:
    """A pronounceable word that means nothing, or one that does."""
    if rng.random() < 0.6:
        return rng.choice(words("nouns") if rng.random() < 0.6 else words("verbs"))
    return "".join(_syllable(rng) for _ in range(rng.choice((1, 1, 2, 2, 3))))


def _syllable(rng: random.Random) -> str:
    end = rng.choice(words("ends")) if rng.random() < 0.85 else ""
    return rng.choice(words("starts")) + rng.choice(words("middles")) + end


def class_name(rng: random.Random) -> str:
    parts = [word(rng).capitalize() for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    if rng.random() < 0.3:
        parts.append(rng.choice(words("types")))
    return "".join(parts) + (str(rng.randrange(10)) if rng.random() < 0.04 else "")


def function_name(rng: random.Random) -> str:
    parts = [word(rng) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    style = rng.random()
    if style < 0.6:
        name = "_".join(parts)
    elif style < 0.8:
        name = parts[0] + "".join(part.capitalize() for part in parts[1:])
    else:
        name = "".join(parts)[:14]
    return name + (str(rng.randrange(100)) if rng.random() < 0.06 else "")


def dotted_name(rng: random.Random, last: str) -> str:
    """The name with none, one or two modules, or a class, before it."""
    depth = rng.choice((0, 1, 1, 1, 1, 2, 2))
    before = [word(rng) for _ in range(depth)]
    if depth == 2 and rng.random() < 0.5:
        before[1] = class_name(rng)
    return ".".join([*before, last])


def module_name(rng: random.Random, name: str) -> str:
    """A module that a made-up name could be in: what stands before it, or another."""
    before = name.rpartition(".")[0]
    if before.islower() and rng.random() < 0.5:
        return before
    return ".".join(word(rng) for _ in range(rng.choice((1, 1, 2))))


def any_name(rng: random.Random) -> str:
    return dotted_name(rng, class_name(rng) if rng.random() < 0.4 else function_name(rng))


def base_names(rng: random.Random) -> list[str]:
    """Bases of a made-up class: mostly one, sometimes up to three."""
    count = rng.choice((1, 1, 1, 1, 2, 2, 3))
    return [dotted_name(rng, class_name(rng)) if rng.random() < 0.35 else class_name(rng) for _ in range(count)]


def sentence(rng: random.Random, models: Sequence[str]) -> str:
    """A summary line of something that does not exist; half of them are real ones with words exchanged."""
    if models and rng.random() < 0.55:
        return _altered(rng, rng.choice(models))
    return deed(rng, start="" if rng.random() < 0.8 else f"A {rng.choice(words('nouns'))}")


def deed(rng: random.Random, start: str = "") -> str:
    """A made-up summary of what a function does."""
    parts = [start or rng.choice(words("verbs")).capitalize()]
    for _ in range(rng.choice((1, 2, 2, 3))):
        parts += [
            rng.choice(("the", "a", "each", "all", "this", "any", "the")),
            *_noun_phrase(rng),
            rng.choice(words("links")),
        ]
    return " ".join([*parts, *_noun_phrase(rng)])[: MAX_SUMMARY - 1].rstrip() + "."


def _noun_phrase(rng: random.Random) -> list[str]:
    noun = rng.choice(words("nouns")) if rng.random() < 0.75 else word(rng)
    return [rng.choice(words("adjectives")), noun] if rng.random() < 0.4 else [noun]


def _altered(rng: random.Random, model: str) -> str:
    parts = model.rstrip(".").split(" ")
    for _ in range(rng.choice((1, 2, 3, 4))):
        index = rng.randrange(len(parts))
        if parts[index].isalpha() and len(parts[index]) > 3:
            parts[index] = word(rng) if index else word(rng).capitalize()
    return " ".join(parts)[: MAX_SUMMARY - 1].rstrip() + "."
