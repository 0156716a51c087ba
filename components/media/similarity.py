"""Near-duplicate pictures: copies of one picture, saved in another format, quality or size.

Two pictures are near-duplicates when their thumbnails of 16 × 16 pixels differ by 2 of 255 on average at most, and
nowhere by more than 32. Perceptual hashes of 64 bits see no colour and take plain drawings for one another; the
figures are in docs/decisions/0031-pictures.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from components.media.pictures import Picture

SIDE = 16
MEAN_DIFFERENCE, MAX_DIFFERENCE = 2.0, 32
_BIN = 2.0  # of mean brightness: near-duplicates differ by MEAN_DIFFERENCE at most, so they lie in adjacent bins
Thumbnails = npt.NDArray[np.uint8]
"""(pictures, SIDE · SIDE · 3)."""


def thumbnails(pictures: Sequence[Picture]) -> Thumbnails:
    """What near-duplicates are told by."""
    small = [Image.fromarray(picture.pixels).resize((SIDE, SIDE), Image.Resampling.BOX) for picture in pictures]
    return np.stack([np.asarray(image).ravel() for image in small])


def near_duplicates(first: Thumbnails, second: Thumbnails) -> bool:
    """Whether each of these pictures is a near-duplicate of the other sequence's at its position."""
    if first.shape != second.shape:
        return False
    difference = np.abs(first.astype(np.int16) - second)
    return bool(difference.max() <= MAX_DIFFERENCE and (difference.mean(axis=1) <= MEAN_DIFFERENCE).all())


class PictureIndex:
    """Sequences of pictures, each with a key, of which near-duplicates are found. 768 bytes a picture."""

    def __init__(self) -> None:
        self._bins: dict[tuple[int, int, int], list[Thumbnails]] = defaultdict(list)
        self._keys: set[int] = set()

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def add(self, key: int, small: Thumbnails) -> None:
        self._keys.add(key)
        self._bins[(key, len(small), int(small[0].mean() / _BIN))].append(small)

    def near(self, key: int, small: Thumbnails) -> bool:
        """Whether near-duplicates of these pictures were added with the key."""
        return any(near_duplicates(other, small) for other in self._candidates(key, small))

    def _candidates(self, key: int, small: Thumbnails) -> Iterator[Thumbnails]:
        bin_ = int(small[0].mean() / _BIN)
        for near in (bin_ - 1, bin_, bin_ + 1):
            yield from self._bins.get((key, len(small), near), ())
