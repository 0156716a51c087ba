"""Limits of files that anyone may have made: a small file must not fill the memory when it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from components.config.errors import InputError

MAX_LINE_CHARACTERS = 1 << 26
"""Characters of one line of JSON lines."""
MAX_CHUNK_BYTES = 1 << 28
"""Bytes of a Parquet column chunk from which on it may not be compressed beyond MAX_RATIO."""
MAX_RATIO = 200
MAX_ROWS_PER_BYTE = 10
"""Rows of a Parquet file for each of its bytes; a row with a text of its own takes several bytes."""


def bounded_lines(name: str, file: TextIO) -> Iterator[str]:
    """The lines of a text file.

    Raises: InputError for one that is too long.
    """
    number = 0
    while line := file.readline(MAX_LINE_CHARACTERS):
        number += 1
        if len(line) == MAX_LINE_CHARACTERS and not line.endswith("\n"):
            raise InputError(f"{name}:{number}: a line of more than {MAX_LINE_CHARACTERS:,} characters; split the file")
        yield line


def check_parquet(name: str, metadata: pq.FileMetaData, size_bytes: int) -> None:
    """Check the sizes that the footer of a file of `size_bytes` states.

    Raises: InputError for far more rows than bytes, as of empty or equal values, and for a column whose pages
    decompress to far more than they are.
    """
    if metadata.num_rows > MAX_ROWS_PER_BYTE * size_bytes:
        raise InputError(f"{name}: {metadata.num_rows:,} rows in {size_bytes:,} bytes; give a file with a text per row")
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            size, compressed = column.total_uncompressed_size, max(1, column.total_compressed_size)
            if size > MAX_CHUNK_BYTES and size > MAX_RATIO * compressed:
                raise InputError(
                    f"{name}: column {column.path_in_schema}: {compressed:,} bytes decompress to {size:,}; write it "
                    f"anew in row groups of at most {MAX_CHUNK_BYTES:,} bytes"
                )


def repeated_texts(schema: pa.Schema) -> list[str]:
    """The columns to read as dictionaries, or a long text in every row would be in memory as often."""
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    return [field.name for field in schema if any(kind(field.type) for kind in kinds)]
