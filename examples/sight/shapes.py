"""easy-VQA: its questions with their answers, and what each of its pictures shows (Victor Zhou, 2019)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from components.config.project import Collecting, Rows
from components.datasets.formats import Row
from components.media.pictures import decode_picture
from examples.sight.dialogue import conversation
from examples.sight.drawing import COLORS, SIDE
from examples.sight.picture_files import VqaPicture, easy_vqa, easy_vqa_source

QUESTIONS_PER_CONVERSATION = 6
"""Of the same picture, which is then encoded once for all; some 120 tokens, so that they fit one row of training."""
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
    training = list(_conversations(rng))
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
    for picture in easy_vqa("train"):
        exchanges = list(dict.fromkeys(picture.questions))
        rng.shuffle(exchanges)
        # Its questions are in lower case alone, people's are not.
        exchanges = [(rng.choice((question, question.capitalize())), answer) for question, answer in exchanges]
        # In parts of equal length: a conversation of one question would encode a picture for little.
        parts = -(-len(exchanges) // QUESTIONS_PER_CONVERSATION)
        for part in range(parts):
            yield conversation([picture.content], exchanges[part::parts])


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
        denies = "no" in question_words or "not" in question_words
        if answer not in YES_NO:
            words |= {answer, *question_words}
        elif (answer == "yes") != denies:
            words |= set(question_words)
    return words
