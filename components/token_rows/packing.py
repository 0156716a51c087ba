"""Packed rows of tokens: several documents or conversations in each, so that nothing is computed on padding.

A row has `seq_len` tokens and holds several pieces, numbered by `segments` so that attention and positions never
cross them. `mask` is 1 on the tokens that are trained on: all of a document, the model's own turns of a conversation,
the repetition (not the first occurrence) of a span of copy augmentation.

    train.ids.bin  train.segments.bin  train.mask.bin    raw little-endian arrays of shape (rows, seq_len)
    train.pictures.bin                                   the same for the pictures of image tokens (picture_rows.py)
    rows.json                                            seq_len, dtype, vocab_size, rows per split
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from components.datasets.formats import write_json
from components.token_rows.augmentation import Piece
from components.token_rows.picture_rows import PictureWriter
from components.tokenization.chat_tokenizer import ChatTokenizer

OPEN_ROWS = 64


class RowWriter:
    """Append packed rows of one split to its three files."""

    def __init__(
        self, folder: Path, split: str, seq_len: int, dtype: str, pictures: PictureWriter | None = None
    ) -> None:
        names = {"ids": dtype, "segments": "uint16", "mask": "uint8"} | ({"pictures": "int32"} if pictures else {})
        self._pictures = pictures
        self._types = {name: np.dtype(kind).newbyteorder("<") for name, kind in names.items()}
        self._files = {name: (folder / f"{split}.{name}.bin").open("wb") for name in names}
        self.seq_len = seq_len
        self.rows = 0
        self.tokens = 0
        self.learned = 0

    def add(self, pieces: list[Piece]) -> None:
        """One row; pieces that together are longer than it are cut."""
        row = {name: np.zeros(self.seq_len, kind) for name, kind in self._types.items()}
        start = 0
        for number, (ids, mask) in enumerate(pieces, start=1):
            stop = min(start + len(ids), self.seq_len)
            numbers = np.array(ids[: stop - start], np.int64)
            if self._pictures is not None:
                numbers, row["pictures"][start:stop] = self._pictures.split(numbers)
            row["ids"][start:stop] = numbers
            row["mask"][start:stop] = mask[: stop - start]
            row["segments"][start:stop] = number
            start = stop
        for name, file in self._files.items():
            file.write(row[name].tobytes())
        self.rows += 1
        self.tokens += start
        self.learned += int(row["mask"].sum())

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def id_type(tokenizer: ChatTokenizer) -> str:
    """The smallest type on disk for every id."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def write_rows_file(
    folder: Path,
    tokenizer: ChatTokenizer,
    seq_len: int,
    writers: Mapping[str, RowWriter],
    pictures: Mapping[str, int] | None = None,
) -> None:
    """Write `rows.json`: shape and type of the splits' arrays, and what `PictureWriter` says of pictures."""
    rows = {split: writer.rows for split, writer in writers.items()}
    info = {"seq_len": seq_len, "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer)}
    write_json(folder / "rows.json", {**info, **(pictures or {}), "rows": rows})


def fill_rows(pieces: Iterable[Piece], writer: RowWriter) -> None:
    """Fill rows completely: a document that does not fit continues in the next row as a new segment."""
    row: list[Piece] = []
    free = writer.seq_len
    for ids, mask in pieces:
        while ids:
            row.append((ids[:free], mask[:free]))
            ids, mask, free = ids[free:], mask[free:], free - len(row[-1][0])
            if not free:
                writer.add(row)
                row, free = [], writer.seq_len
    if row:
        writer.add(row)


def pack_rows(pieces: Iterable[Piece], writer: RowWriter) -> int:
    """Put whole pieces into the fullest open row that has room; return how many were too long for any."""
    too_long = 0
    rows: list[tuple[int, list[Piece]]] = []
    for ids, mask in pieces:
        if len(ids) > writer.seq_len:
            too_long += 1
            continue
        room = [index for index, (used, _) in enumerate(rows) if used + len(ids) <= writer.seq_len]
        best = max(room, key=lambda index: rows[index][0], default=None)
        used, row = (0, []) if best is None else rows.pop(best)
        rows.append((used + len(ids), [*row, (ids, mask)]))
        if len(rows) > OPEN_ROWS:
            writer.add(rows.pop(max(range(len(rows)), key=lambda index: rows[index][0]))[1])
    for _, row in rows:
        writer.add(row)
    return too_long
