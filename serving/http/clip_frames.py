"""Frames of a clip sampled by time: of animations, which Pillow reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageSequence

from components.config.params import InputError
from components.media.pictures import IMAGE, Picture

MAX_FRAMES = 8
MAX_DECODED = 400
"""Frames that are decoded of a clip at most."""


@dataclass(frozen=True)
class Frame:
    seconds: float
    picture: Picture


def decode_clip(content: bytes, where: str) -> list[Frame]:
    """At most 8 frames, evenly by time, the first and the last among them.

    Raises: InputError naming `where` when the bytes are no animation.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            times, pictures, seconds = [], [], 0.0
            for _, frame in zip(range(MAX_DECODED), ImageSequence.Iterator(image), strict=False):
                times.append(seconds)
                pictures.append(Picture(np.asarray(frame.convert("RGB"))))
                seconds += frame.info.get("duration", 100) / 1000
    except OSError as error:
        raise InputError(f"{where}: not a readable clip: {error}") from None
    count = min(MAX_FRAMES, len(times))
    targets = np.linspace(0, times[-1], count)
    chosen = sorted({int(np.argmin(np.abs(np.array(times) - target))) for target in targets})
    return [Frame(times[number], pictures[number]) for number in chosen]


def clip_content(frames: Sequence[Frame]) -> str:
    """The text of a clip: each frame's mark after its time."""
    return " ".join(f"{frame.seconds:.1f} s {IMAGE}" for frame in frames)
