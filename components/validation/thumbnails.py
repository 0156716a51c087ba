"""Thumbnails of rows with pictures, as data URLs, for pages that load nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from components.config.errors import InputError
from components.datasets.formats import Row
from components.media.pictures import decode_picture

SAMPLES = 6
"""First rows of a shard that a page shows."""
_PIXELS = 96 * 96
_MAX_PICTURES = 8  # of a row: a clip has more frames than say what it shows
_TEXT_CHARS = 200


@dataclass(frozen=True)
class PictureRow:
    """What a page shows of a row."""

    shard: str
    row: int
    """From 1 within the shard."""
    pictures: tuple[str, ...]
    """Data URLs; empty for a picture that cannot be read."""
    text: str
    offending: bool = False


def picture_rows(shard: Path, offending: Iterable[int] = ()) -> list[PictureRow]:
    """The first rows of a shard and those of these numbers, from 1, a row group in memory at a time."""
    numbers = set(offending)
    return [
        _picture_row(shard.name, number, row, number in numbers)
        for number, row in _rows(shard, sorted(numbers | set(range(1, SAMPLES + 1))))
    ]


def _rows(shard: Path, numbers: Sequence[int]) -> Iterator[tuple[int, Row]]:
    with pq.ParquetFile(shard) as file:
        before = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            chosen = [number for number in numbers if before < number <= before + count]
            if chosen:
                table = file.read_row_group(group, columns=["images", "messages"])
                yield from zip(chosen, table.take([number - before - 1 for number in chosen]).to_pylist(), strict=True)
            before += count


def _picture_row(shard: str, number: int, row: Row, offending: bool) -> PictureRow:
    pictures = tuple(_data_url(content) for content in (row["images"] or [])[:_MAX_PICTURES])
    turns = (f"{message['role']}: {' '.join((message['content'] or '').split())}" for message in row["messages"] or [])
    text = " · ".join(turns)
    return PictureRow(shard, number, pictures, text[:_TEXT_CHARS] + "…" * (len(text) > _TEXT_CHARS), offending)


def _data_url(content: bytes | None) -> str:
    try:
        small = decode_picture(content or b"", "picture").within(_PIXELS)
    except InputError:
        return ""
    return f"data:image/png;base64,{base64.b64encode(small.png()).decode()}"
