"""Pictures: decoded from bytes that anyone may have sent, and known by the digest of their pixels."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from components.config.errors import InputError

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
