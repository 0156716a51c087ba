"""Captions of pictures: silhouettes of animals in a color, and the shapes of easy-VQA.

A caption names size, color, object and place, "a small red cat in the upper left": of seven words or more, so that
metrics of runs of four words tell captions apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from components.config.project import Collecting, Rows
from components.datasets.formats import Row
from components.media.pictures import Picture
from examples.sight.dialogue import Exchange, conversation, wording
from examples.sight.drawing import COLORS, SIDE, Mark, draw, extent, random_ground, with_turned
from examples.sight.picture_files import ANIMALS, Grey, easy_vqa_source, silhouettes
from examples.sight.shapes import ShapeCaption, place, shape_captions

SIZES = {"small": (22, 26), "large": (38, 44)}
"""Pixels of the longer side of a silhouette."""
FROM_MIDDLE = 6
"""Pixels between the middle of the picture and of a silhouette, at least, so that its place is plain."""
MOST = 20_000
SHAPE_SHARE = 0.3
"""Of the training conversations, those about shapes: there are ten times as many kinds of silhouettes."""


def caption_rows(collecting: Collecting) -> Rows:
    """Half as many training conversations as the settings name, and held-out captions of held-out pictures."""
    settings, seed = collecting.settings, collecting.seed
    stamps = silhouettes(settings.held_out_share, seed)
    count = min(settings.conversations // 2, MOST)
    rng = random.Random(f"{seed}:captions:test")
    shapes = shape_captions("test")
    rng.shuffle(shapes)
    tests = [_shape(rng, shape, "captions/shapes") for shape in shapes[: settings.questions]]
    for suite in ("captions/silhouettes", "captions/new_wordings"):
        tests += [_silhouette(rng, stamps.test, suite) for _ in range(settings.questions)]
    rng = random.Random(f"{seed}:captions")
    training = _training(rng, count, with_turned(stamps.train, rng))
    return Rows(training, tests, sources=[stamps.source, easy_vqa_source()])


def _training(rng: random.Random, count: int, stamps: dict[str, list[Grey]]) -> Iterator[Row]:
    shapes = shape_captions("train")
    for _ in range(count):
        yield _shape(rng, rng.choice(shapes)) if rng.random() < SHAPE_SHARE else _silhouette(rng, stamps)


def _shape(rng: random.Random, shape: ShapeCaption, suite: str | None = None) -> Row:
    exchanges = [(wording(rng, "describe"), shape.text), (wording(rng, "color"), shape.color)]
    return conversation([shape.picture.content], _asked(rng, exchanges, suite), suite)


def _silhouette(rng: random.Random, stamps: dict[str, list[Grey]], suite: str | None = None) -> Row:
    animal, color, size = rng.choice(ANIMALS), rng.choice(list(COLORS)), rng.choice(list(SIZES))
    stamp, pixels = rng.choice(stamps[animal]), rng.randint(*SIZES[size])
    width, height = extent(stamp, pixels)
    left, top = _off_middle(rng, width), _off_middle(rng, height)
    picture = Picture(draw(random_ground(rng), [Mark(stamp, left, top, pixels, COLORS[color])]))
    caption = f"a {size} {color} {animal} in the {place(left + width / 2, top + height / 2)}"
    is_new = suite is not None and suite.endswith("new_wordings")
    exchanges = [
        (wording(rng, "describe", is_new), caption),
        (wording(rng, "animal"), animal),
        (wording(rng, "color"), color),
    ]
    return conversation([picture.png()], _asked(rng, exchanges, suite), suite)


def _asked(rng: random.Random, exchanges: Sequence[Exchange], suite: str | None) -> list[Exchange]:
    """The request for a caption alone where it is held out, else all in a random order."""
    return list(exchanges[:1]) if suite else rng.sample(exchanges, len(exchanges))


def _off_middle(rng: random.Random, length: int) -> int:
    """A start of a range of `length` pixels within the picture, whose middle is off the picture's."""
    starts = range(SIDE - length + 1)
    return rng.choice([start for start in starts if abs(start + length / 2 - SIDE / 2) >= FROM_MIDDLE])
