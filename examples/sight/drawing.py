"""Small pictures of objects drawn into larger ones: a stamp is cut out, scaled and laid in ink on a ground."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from components.media.pictures import Pixels
from examples.sight.picture_files import Grey

SIDE = 64
"""Pixels of each side of a drawn picture."""
STAMP = 28
"""Pixels of each side of a stamp."""
MOST_TURNED, TURNED_COPIES = 12, 3
"""Degrees, and copies of each stamp."""
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


def random_shape(rng: random.Random) -> Grey:
    """A stamp: a polygon of some random points about its middle, or an ellipse."""
    image = Image.new("L", (STAMP, STAMP))
    canvas = ImageDraw.Draw(image)
    if rng.random() < 0.3:
        left, top = rng.randint(0, STAMP // 3), rng.randint(0, STAMP // 3)
        canvas.ellipse((left, top, STAMP - 1 - left, STAMP - 1 - top), fill=255)
    else:
        middle = STAMP / 2
        corners = rng.randint(3, 7)
        angles = [2 * math.pi * (number + rng.random()) / corners for number in range(corners)]
        radii = [rng.uniform(0.6, 1) * middle for _ in angles]
        points = [(middle + r * math.cos(a), middle + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]
        canvas.polygon(points, fill=255, outline=255)
    return np.asarray(image)


def with_turned(stamps: Mapping[str, Sequence[Grey]], rng: random.Random) -> dict[str, list[Grey]]:
    """Stamps by object, each also turned by a few degrees: what training learns from few drawings of an object."""
    return {
        name: [*originals, *(_turned(rng, stamp) for stamp in originals for _ in range(TURNED_COPIES))]
        for name, originals in stamps.items()
    }


def _turned(rng: random.Random, stamp: Grey) -> Grey:
    image = Image.fromarray(stamp).resize((2 * STAMP, 2 * STAMP), Image.Resampling.BILINEAR)
    return np.asarray(image.rotate(rng.uniform(-MOST_TURNED, MOST_TURNED), Image.Resampling.BILINEAR, expand=True))


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
