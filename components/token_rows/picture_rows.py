"""The pictures of token rows: each stored once, in the size that the tower reads, and named at its image tokens.

    pictures.bin          PNG files, one behind the other
    pictures.ends.bin     where each ends, int64
    train.pictures.bin    (rows, seq_len) int32: the picture whose image token this is, counted from 1; 0 elsewhere

In a piece (`packing.py`), vocab_size + N is an image token of picture N.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.config.params import InputError
from components.media.pictures import Picture, Pixels, decode_picture, resized
from components.token_rows.augmentation import Piece
from components.tokenization.chat_tokenizer import ChatTokenizer

FILE, ENDS = "pictures.bin", "pictures.ends.bin"


@dataclass(frozen=True)
class ImageTokens:
    """How pictures stand in rows; part of rows.json."""

    image_id: int
    image_tokens: int
    """Of a picture."""
    image_size: int
    """Height and width in pixels."""


class PictureWriter:
    """Append pictures of a folder of rows."""

    def __init__(self, folder: Path, tokenizer: ChatTokenizer, image_size: int) -> None:
        self.info = ImageTokens(tokenizer.image_id, tokenizer.image_tokens, image_size)
        self._vocab_size = tokenizer.vocab_size
        self._numbers: dict[str, int] = {}
        self._ends = [0]
        self._file, self._ends_path = (folder / FILE).open("wb"), folder / ENDS

    def piece(self, piece: Piece, pictures: list[Picture]) -> Piece:
        """A conversation's ids and mask, its image tokens naming these pictures, in order."""
        ids, mask = list(piece[0]), piece[1]
        places = [position for position, number in enumerate(ids) if number == self.info.image_id]
        for count, position in enumerate(places):
            ids[position] = self._vocab_size + self._number(pictures[count // self.info.image_tokens])
        return ids, mask

    def split(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids as the model reads them, and the pictures' numbers from 1 at image tokens."""
        numbers = np.maximum(ids - self._vocab_size + 1, 0)
        return np.where(numbers > 0, self.info.image_id, ids), numbers

    def _number(self, picture: Picture) -> int:
        if picture.digest not in self._numbers:
            self._numbers[picture.digest] = len(self._numbers)
            content = Picture(resized(picture, self.info.image_size)).png()
            self._file.write(content)
            self._ends.append(self._ends[-1] + len(content))
        return self._numbers[picture.digest]

    def close(self) -> dict[str, Any]:
        """Finish the files; what rows.json says of them."""
        self._file.close()
        np.array(self._ends, "<i8").tofile(self._ends_path)
        return asdict(self.info)


class PictureReader:
    """The pictures of a folder of rows, by number."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        try:
            self._ends = np.fromfile(folder / ENDS, "<i8")
            self._content = np.memmap(self._path, np.uint8, "r") if self._ends[-1] else np.zeros(0, np.uint8)
        except (OSError, IndexError):
            raise InputError(f'{self._path}: not readable; run "loopwright run --until prepare"') from None

    def pixels(self, number: int) -> Pixels:
        """(image_size, image_size, 3)."""
        content = self._content[self._ends[number] : self._ends[number + 1]].tobytes()
        return decode_picture(content, f"{self._path}: picture {number}").pixels
