"""Packed rows of tokens: several documents or conversations in each, so that nothing is computed on padding.

A row has `seq_len` tokens and holds several pieces, numbered by `segments` so that attention and positions never
cross them. `mask` is 1 on the tokens that are trained on: all of a document, the model's own turns of a conversation,
the repetition (not the first occurrence) of a span of copy augmentation.

    train.ids.bin  train.segments.bin  train.mask.bin    raw little-endian arrays of shape (rows, seq_len)
    train.pictures.bin                                   the same for the pictures of image tokens (picture_rows.py)
    rows.json                                            seq_len, dtype, vocab_size, rows per split
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.datasets.formats import batched, write_json
from components.runtime.shards import Output, concatenate
from components.token_rows.augmentation import Piece
from components.token_rows.picture_rows import ENDS, FILE, PictureWriter
from components.tokenization.chat_tokenizer import ChatTokenizer

OPEN_ROWS = 64
DOCUMENTS_AT_ONCE = 512
COUNTS = ("rows", "tokens", "learned")
"""What a writer counts: `learned` are the tokens that are trained on."""


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

    def add_documents(self, rows: npt.NDArray[np.int64]) -> None:
        """Rows (3, N, T) of ids, numbers of documents and mask, filled from their start; a shorter T is padded."""
        ids, documents, mask = rows
        padding = ((0, 0), (0, self.seq_len - rows.shape[2]))
        segments = documents - documents[:, :1] + 1
        for name, values in (("ids", ids), ("segments", segments), ("mask", mask)):
            self._files[name].write(np.pad(values, padding).astype(self._types[name]).tobytes())
        self.rows += len(ids)
        self.tokens += ids.size
        self.learned += int(mask.sum())

    def close(self) -> dict[str, int]:
        """Finish the files; `COUNTS` of the split."""
        for file in self._files.values():
            file.close()
        return {name: getattr(self, name) for name in COUNTS}


def join_rows(
    folder: Path, splits: Sequence[str], outputs: Sequence[Output], with_pictures: bool = False
) -> dict[str, int]:
    """Write the arrays of a folder of rows from those of shards, one behind the other; SPLIT_COUNT for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for split in splits:
        parts = [output for output in outputs if split in output.result["splits"]]
        for name in ("ids", "segments", "mask", *(["pictures"] if with_pictures else [])):
            file = f"{split}.{name}.bin"
            concatenate(folder / file, [part.folder / file for part in parts])
        counts |= {f"{split}_{name}": sum(part.result["splits"][split][name] for part in parts) for name in COUNTS}
    for file in (FILE, ENDS) if with_pictures else ():
        concatenate(folder / file, [output.folder / file for output in outputs])  # of one shard
    return counts


def id_type(tokenizer: ChatTokenizer) -> str:
    """The smallest type on disk for every id."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def write_rows_file(
    folder: Path,
    tokenizer: ChatTokenizer,
    seq_len: int,
    rows: Mapping[str, int],
    pictures: Mapping[str, int] | None = None,
) -> None:
    """Write `rows.json`: shape and type of the splits' arrays, and what `PictureWriter` says of pictures."""
    info = {"seq_len": seq_len, "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer)}
    write_json(folder / "rows.json", {**info, **(pictures or {}), "rows": dict(rows)})


def fill_rows(documents: Iterable[Sequence[int]], writer: RowWriter) -> None:
    """Fill rows completely: a document that does not fit continues in the next row as a new segment.

    Of each document all tokens are trained on but the first.
    """
    left, count = np.zeros((3, 0), np.int64), 0
    for group in batched(documents, DOCUMENTS_AT_ONCE):
        lengths = np.fromiter(map(len, group), np.int64, len(group))
        ends = np.cumsum(lengths)
        tokens = np.ones((3, ends[-1]), np.int64)  # ids, numbers of documents, mask
        tokens[0] = np.fromiter(chain.from_iterable(group), np.int64, ends[-1])
        tokens[1] = np.repeat(np.arange(count, count + len(group)), lengths)
        tokens[2, ends - lengths] = 0
        tokens = np.concatenate([left, tokens], axis=1)
        stop = tokens.shape[1] // writer.seq_len * writer.seq_len
        writer.add_documents(tokens[:, :stop].reshape(3, -1, writer.seq_len))
        left, count = tokens[:, stop:], count + len(group)
    if left.shape[1]:
        writer.add_documents(left[:, None])


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
