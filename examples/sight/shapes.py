"""easy-VQA: its questions with their answers, and what each of its pictures shows (Victor Zhou, 2019)."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from components.config.project import Collecting, Rows
from components.datasets.formats import Row
from components.media.pictures import decode_picture
from examples.sight.dialogue import Exchange, conversation
from examples.sight.drawing import COLORS, SIDE
from examples.sight.picture_files import VqaPicture, easy_vqa, easy_vqa_source

CONVERSATIONS_PER_PICTURE, MOST_QUESTIONS = 5, 3
"""Training conversations about a picture, and the questions of each."""
SHOWN_SHARE = 0.4
"""Of the yes-no questions in training, those that name what the picture shows. One in three shapes and one in eight
colors do by chance: without the picture a model would then be right so often that it learns little from it."""
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")
DISTANCE = 60
"""Sum of a pixel's differences from the ground's color, from which on it is of the shape."""
MARGIN = 3
"""Pixels: a shape nearer to the middle, or to the boundary of small and large, is not captioned."""
LARGE = 20
"""Pixels of the longer side, from which on a shape is large."""


class ShapeCaption(NamedTuple):
    """What a picture of easy-VQA shows."""

    picture: VqaPicture
    size: str
    color: str
    shape: str
    place: str
    """Such as "upper left"."""

    @property
    def text(self) -> str:
        return f"a {self.size} {self.color} {self.shape} in the {self.place}"


def vqa(collecting: Collecting) -> Rows:
    """Every question of the official test split, and as many training conversations as settings and pictures allow."""
    rng = random.Random(f"{collecting.seed}:vqa")
    training = list({row["id"]: row for row in _conversations(rng)}.values())
    rng.shuffle(training)
    tests = [
        conversation([picture.content], [exchange], vqa_suite(exchange[1]))
        for picture in easy_vqa("test")
        for exchange in picture.questions
    ]
    # `evaluate` reads the first questions of each suite.
    rng.shuffle(tests)
    return Rows(training[: collecting.settings.conversations], tests, sources=[easy_vqa_source()])


def vqa_suite(answer: str) -> str:
    """The suite of a question with this answer."""
    return "vqa/yes_no" if answer in YES_NO else "vqa/shape" if answer in SHAPES else "vqa/color"


def _conversations(rng: random.Random) -> Iterator[Row]:
    """Of a picture, a conversation of questions that name color or shape, and some of two that are yes or no and one.

    The two are about a color and about a shape and come first, so that no earlier answer tells theirs.
    """
    for picture in easy_vqa("train"):
        questions = list(dict.fromkeys(picture.questions))
        rng.shuffle(questions)
        yes_no = [exchange for exchange in questions if exchange[1] in YES_NO]
        kinds = [[exchange for exchange in yes_no if _named(exchange[0], names)] for names in (COLORS, SHAPES)]
        naming = [exchange for exchange in questions if exchange[1] not in YES_NO]
        words, conversations = _true_words(picture), [naming[:MOST_QUESTIONS]]
        for number in range(1, CONVERSATIONS_PER_PICTURE):
            exchanges = [_renamed(rng, words, kind[number % len(kind)]) for kind in kinds if kind]
            rng.shuffle(exchanges)
            conversations.append(exchanges + ([naming[number % len(naming)]] if naming else []))
        for exchanges in conversations:
            # Its questions are in lower case alone, people's are not.
            exchanges = [(rng.choice((question, question.capitalize())), answer) for question, answer in exchanges]
            if exchanges:
                yield conversation([picture.content], exchanges)


def _renamed(rng: random.Random, words: set[str], exchange: Exchange) -> Exchange:
    """A yes-no question with a color or shape drawn anew, and its answer; as it is where `words` name none of the kind.

    `words`: the color and shape that the picture shows.
    """
    question = exchange[0]
    names = COLORS if _named(question, COLORS) else SHAPES
    shown = next((name for name in names if name in words), "")
    if not shown:
        return exchange
    name = shown if rng.random() < SHOWN_SHARE else rng.choice([name for name in names if name != shown])
    return question.replace(_named(question, names), name), "yes" if (name == shown) != _denies(question) else "no"


def _named(question: str, names: Collection[str]) -> str:
    """The color or shape that a question names, "" where there is none."""
    return next((word for word in question.rstrip("?").split() if word in names), "")


def _denies(question: str) -> bool:
    return not {"no", "not"}.isdisjoint(question.split())


def shape_captions(split: str) -> list[ShapeCaption]:
    """Captions of the pictures of an official split that show plainly where and how large their shape is.

    Color and shape are those that the questions name; a picture whose questions name only one is left out.
    """
    return [caption for picture in easy_vqa(split) if (caption := _caption(picture))]


def _caption(picture: VqaPicture) -> ShapeCaption | None:
    words = _true_words(picture)
    color, shape = (next((word for word in words if word in known), "") for known in (COLORS, SHAPES))
    left, top, width, height = bounding_box(picture.content)
    longer, (x, y) = max(width, height), (left + width / 2, top + height / 2)
    is_plain = abs(longer - LARGE) >= MARGIN and min(abs(x - SIDE / 2), abs(y - SIDE / 2)) >= MARGIN
    if not (color and shape and is_plain):
        return None
    return ShapeCaption(picture, "large" if longer >= LARGE else "small", color, shape, place(x, y))


def place(x: float, y: float) -> str:
    """The quarter of the picture in which a point lies, in pixels from the upper left."""
    return f"{'upper' if y < SIDE / 2 else 'lower'} {'left' if x < SIDE / 2 else 'right'}"


def bounding_box(content: bytes) -> tuple[int, int, int, int]:
    """Left, top, width and height of what differs from the most frequent color of a picture."""
    pixels = decode_picture(content, "picture").pixels.astype(int)
    colors, counts = np.unique(pixels @ (65536, 256, 1), return_counts=True)
    ground = colors[counts.argmax()] // (65536, 256, 1) % 256
    mask = np.abs(pixels - ground).sum(axis=2) > DISTANCE
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def _true_words(picture: VqaPicture) -> set[str]:
    """The colors and shapes that the picture shows, by its questions and answers."""
    words: set[str] = set()
    for question, answer in picture.questions:
        question_words = question.rstrip("?").split()
        if answer not in YES_NO:
            words |= {answer, *question_words}
        elif (answer == "yes") != _denies(question):
            words |= set(question_words)
    return words
