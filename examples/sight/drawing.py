"""Small pictures of objects drawn into larger ones: a stamp is cut out, scaled and laid in ink on a ground."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from components.media.pictures import Pixels
from examples.sight.picture_files import Grey

SIDE = 64
"""Pixels of each side of a drawn picture."""
Color = tuple[int, int, int]
COLORS: dict[str, Color] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
"""Those of easy-VQA."""
PALEST, DARKEST = 255, 230
"""Range of a ground's channels."""


class Mark(NamedTuple):
    """Where and how a stamp is drawn."""

    stamp: Grey
    left: float
    top: float
    size: float
    """Pixels of the longer side of the object."""
    color: Color = (0, 0, 0)


def random_ground(rng: random.Random) -> Color:
    """A pale color."""
    return (rng.randint(DARKEST, PALEST), rng.randint(DARKEST, PALEST), rng.randint(DARKEST, PALEST))


def extent(stamp: Grey, size: float) -> tuple[int, int]:
    """Width and height, in pixels, of a stamp's object when its longer side has `size` pixels."""
    height, width = cut_out(stamp).shape
    scale = size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def cut_out(stamp: Grey) -> Grey:
    """The part of a stamp with the object."""
    rows, columns = np.flatnonzero(stamp.max(axis=1)), np.flatnonzero(stamp.max(axis=0))
    return stamp[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw(ground: Color, marks: Iterable[Mark]) -> Pixels:
    """A picture (SIDE, SIDE, 3) of marks on a ground; each mark lies within the picture."""
    canvas = np.full((SIDE, SIDE, 3), ground, dtype=np.float32)
    for mark in marks:
        width, height = extent(mark.stamp, mark.size)
        image = Image.fromarray(cut_out(mark.stamp)).resize((width, height), Image.Resampling.BILINEAR)
        ink = np.asarray(image, dtype=np.float32)[:, :, None] / 255
        left, top = round(mark.left), round(mark.top)
        part = canvas[top : top + height, left : left + width]
        part += ink * (np.asarray(mark.color, dtype=np.float32) - part)
    return np.round(canvas).astype(np.uint8)


def at_random_place(rng: random.Random, stamp: Grey, size: float, color: Color = (0, 0, 0)) -> Mark:
    """A mark anywhere within the picture."""
    width, height = extent(stamp, size)
    return Mark(stamp, rng.randint(0, SIDE - width), rng.randint(0, SIDE - height), size, color)
