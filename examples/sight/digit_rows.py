"""Questions about handwritten digits, drawn at random places and sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator

from components.config.project import Collecting, Rows
from components.datasets.formats import Row
from components.media.pictures import Picture
from examples.sight.dialogue import Exchange, conversation, wording
from examples.sight.drawing import at_random_place, draw, random_ground, with_turned
from examples.sight.picture_files import Grey, digits

SIZES = (40, 60)
"""Pixels of a digit's longer side."""
MOST = 20_000
"""Training conversations: more drawings of the same digits add little."""
PAIR_SHARE = 0.5
"""Of the training conversations, those about two digits."""
DIGITS = tuple(str(digit) for digit in range(10))


def digit_rows(collecting: Collecting) -> Rows:
    """As many training conversations as the settings name, and held-out questions about held-out digits."""
    settings, seed = collecting.settings, collecting.seed
    stamps = digits(settings.held_out_share, seed)
    rng = random.Random(f"{seed}:digits:test")
    tests = [
        _question(rng, task, f"digits/{task}", stamps.test)
        for task in ("which", "parity", "larger")
        for _ in range(settings.questions)
    ]
    tests += [
        _question(rng, rng.choice(("which", "parity", "larger")), "digits/new_wordings", stamps.test)
        for _ in range(settings.questions)
    ]
    count = min(settings.conversations, MOST)
    rng = random.Random(f"{seed}:digits")
    return Rows(_training(rng, count, with_turned(stamps.train, rng)), tests, sources=[stamps.source])


def parity(digit: str) -> str:
    return "odd" if int(digit) % 2 else "even"


def larger(first: str, second: str) -> str:
    return "the first" if int(first) > int(second) else "the second"


def _training(rng: random.Random, count: int, stamps: dict[str, list[Grey]]) -> Iterator[Row]:
    for _ in range(count):
        if rng.random() < PAIR_SHARE:
            first, second = rng.sample(DIGITS, 2)
            names = [(wording(rng, "first_digit"), first), (wording(rng, "second_digit"), second)]
            # First: behind the digits' names it is answered without the pictures.
            exchanges = [(wording(rng, "larger"), larger(first, second)), *rng.sample(names, 2)]
            images = [_drawn(rng, digit, stamps) for digit in (first, second)]
        else:
            digit = rng.choice(DIGITS)
            exchanges = rng.sample([(wording(rng, "which"), digit), (wording(rng, "parity"), parity(digit))], 2)
            images = [_drawn(rng, digit, stamps)]
        yield conversation(images, exchanges)


def _question(rng: random.Random, task: str, suite: str, stamps: dict[str, list[Grey]]) -> Row:
    first, second = rng.sample(DIGITS, 2)
    answer = {"which": first, "parity": parity(first), "larger": larger(first, second)}[task]
    shown = (first, second) if task == "larger" else (first,)
    exchange: Exchange = (wording(rng, task, suite.endswith("new_wordings")), answer)
    return conversation([_drawn(rng, digit, stamps) for digit in shown], [exchange], suite)


def _drawn(rng: random.Random, digit: str, stamps: dict[str, list[Grey]]) -> bytes:
    mark = at_random_place(rng, rng.choice(stamps[digit]), rng.randint(*SIZES))
    return Picture(draw(random_ground(rng), [mark])).png()
