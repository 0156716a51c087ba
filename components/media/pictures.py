"""Pictures: decoded from bytes that anyone may have sent, and known by the digest of their pixels."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from components.config.errors import InputError

IMAGE = "<image>"
"""Stands in a message's content where a picture is; the pictures are in the message's `images`, in order."""
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture."""

    pixels: Pixels
    """(height, width, 3), RGB."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of size and pixels: equal for files that show the same."""
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()

    def png(self) -> bytes:
        """The picture as a PNG file without metadata."""
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "PNG")
        return file.getvalue()


def decode_picture(content: bytes, where: str) -> Picture:
    """The picture in the bytes of a file.

    Raises: InputError naming `where` when they are no picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return Picture(np.asarray(image.convert("RGB")))
    except OSError as error:
        raise InputError(f"{where}: not a readable picture: {error}") from None


def resized(picture: Picture, size: int) -> Pixels:
    """The pixels (size, size, 3) of a picture, its proportions given up, as SigLIP reads pictures."""
    if picture.pixels.shape[:2] == (size, size):
        return picture.pixels
    return np.asarray(Image.fromarray(picture.pixels).resize((size, size), Image.Resampling.BICUBIC))


def with_pictures(messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Messages as read from a row of kind `images`, each with its pictures, which its marks count, in `images`.

    Raises: InputError when there are more or fewer marks than pictures.
    """
    left, complete = list(pictures), []
    for message in messages:
        count = str(message.get("content") or "").count(IMAGE)
        complete.append({**message, "images": left[:count]} if count else dict(message))
        del left[:count]
    marks = sum(str(message.get("content") or "").count(IMAGE) for message in messages)
    if marks != len(pictures):
        raise InputError(f"messages: {marks} marks {IMAGE} for {len(pictures)} pictures; give one for each")
    return complete


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The pictures of messages, in order."""
    return [picture for message in messages for picture in message.get("images") or ()]
