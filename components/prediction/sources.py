"""Rows of a source of batch inference: JSON lines, CSV and Parquet files, here or in an object store.

A file is cut into parts of bounded size, which name their bytes (of Parquet their rows): a worker reads its part alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from components.config.errors import InputError, reason_of
from components.datasets.csv_dialect import csv_dialect, refuse_repeated
from components.datasets.file_limits import MAX_LINE_CHARACTERS, check_parquet
from components.runtime.object_store import list_files, open_file, size_of

Format = Literal["jsonl", "csv", "parquet"]
FORMATS: Mapping[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
}
"""Formats of files by their suffix."""
MAX_PART_BYTES = 64 << 20
"""Of JSON lines or CSV: a part ends behind the row that reaches it."""
ROWS_READ = 1024
"""Rows of a part that are in memory at once."""
MAX_COLUMNS = 1000
_TYPES: Mapping[type, str] = {bool: "bool", int: "int64", float: "double", str: "string"}
"""Arrow types of JSON values; a column with others, or with several, is written as JSON text."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """Adjoining rows of one file."""

    address: str
    format: Format
    start: int
    """First byte; of Parquet, the number of the first row."""
    stop: int
    row: int
    """The number of its first row in the file, from 1."""
    rows: int
    columns: Mapping[str, str] = field(default_factory=dict)
    """Arrow types of the columns by name, or `json`; Parquet files have their own."""
    dialect: tuple[str, Literal[0, 3]] = (",", csv.QUOTE_MINIMAL)
    """Of CSV, see `csv_dialect`."""


@dataclass(frozen=True)
class Rows:
    """Rows in memory at once."""

    table: pa.Table
    """All columns of the source."""
    values: Sequence[dict[str, Any] | InputError]
    """The values of the wanted columns as JSON, or why a row cannot be read."""


def source_files(source: str) -> list[str]:
    """The files of a source that have a known format, in order of name.

    Raises: InputError where there is none.
    """
    listed = list_files(source)
    files = [file for file in listed if _suffix(file) in FORMATS]
    if not files:
        names = ", ".join(sorted({_suffix(file) or "without suffix" for file in listed}))
        raise InputError(f"{source}: {names}: not a format of batch inference; allowed: {', '.join(FORMATS)}")
    return files


def first_columns(file: str) -> list[str]:
    """The columns of a file, or of its first row.

    Raises: InputError when the file is not readable.
    """
    kind = FORMATS[_suffix(file)]
    with open_file(file) as opened:
        if kind == "parquet":
            with _parquet(file, opened) as table:
                names = list(table.schema_arrow.names)
                refuse_repeated(file, names)
                return names
        if kind == "csv":
            return _header(file, opened)[1]
        first = next((line for _, line in _lines(file, opened) if line.strip()), None)
    return [] if first is None else list(_object(f"{file}: first row", first))


def parts(file: str, column: str, max_rows: int) -> Iterator[Part]:
    """The parts of a file, of `max_rows` rows at most.

    Raises: InputError when the file is not readable, or has no such column.
    """
    kind = FORMATS[_suffix(file)]
    columns = first_columns(file)
    if columns and not {column, column.partition(".")[0]} & set(columns):
        raise InputError(f"{file}: no column {column!r}; found columns: {', '.join(columns)}; name one with --column")
    if kind == "parquet":
        with open_file(file) as opened, _parquet(file, opened) as table:
            check_parquet(file, table.metadata, size_of(file) or 0)
            count = table.metadata.num_rows
        for start in range(0, count, max_rows):
            stop = min(start + max_rows, count)
            yield Part(file, kind, start, stop, start + 1, stop - start)
    elif kind == "csv":
        with open_file(file) as opened:
            start, names, dialect = _header(file, opened)
            types = dict.fromkeys(names, "string")
            ends = (end for end, _ in _csv_rows(file, opened, start, dialect))
            for first, stop, row, rows in _cut(ends, start, max_rows):
                yield Part(file, kind, first, stop, row, rows, types, dialect)
    else:
        with open_file(file) as opened:
            kinds: dict[str, set[str]] = {}
            cuts = list(_cut(_object_ends(file, opened, kinds), 0, max_rows))
        types = {name: _merged(types) for name, types in kinds.items()}
        yield from (Part(file, kind, first, stop, row, rows, types) for first, stop, row, rows in cuts)


def read_rows(part: Part, wanted: Sequence[str]) -> Iterator[Rows]:
    """The rows of a part, ROWS_READ at a time, with the values of the wanted columns that it has."""
    with open_file(part.address) as opened:
        if part.format == "parquet":
            for batch in _parquet_batches(part, opened):
                names = [name for name in dict.fromkeys(wanted) if name in batch.schema.names]
                yield Rows(batch, batch.select(names).to_pylist())
            return
        read = _read_csv if part.format == "csv" else _read_objects
        pending: list[dict[str, Any] | InputError] = []
        for row in read(part, opened):
            pending.append(row)
            if len(pending) == ROWS_READ:
                yield _rows(part, pending, wanted)
                pending = []
        if pending:
            yield _rows(part, pending, wanted)


def _rows(part: Part, rows: list[dict[str, Any] | InputError], wanted: Sequence[str]) -> Rows:
    read: list[dict[str, Any]] = [{} if isinstance(row, InputError) else row for row in rows]
    columns = {
        name: pa.array([_plain(row.get(name), kind) for row in read], "string" if kind == "json" else kind)
        for name, kind in part.columns.items()
    }
    values = [
        row if isinstance(row, InputError) else {name: row[name] for name in wanted if name in row} for row in rows
    ]
    return Rows(pa.table(columns), values)


def _plain(value: Any, kind: str) -> Any:
    return value if kind != "json" or value is None else json.dumps(value, ensure_ascii=False)


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


def _lines(file: str, opened: IO[bytes], start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines from a byte on, each with the offset of its end; the mark of UTF-8 at the beginning is left out."""
    opened.seek(start)
    end = start
    while line := opened.readline(MAX_LINE_CHARACTERS):
        if len(line) == MAX_LINE_CHARACTERS:
            raise InputError(f"{file}: a line of more than {MAX_LINE_CHARACTERS:,} bytes at {end}; split the file")
        end += len(line)
        yield end, line.removeprefix(_BOM) if end == len(line) else line


def _cut(ends: Iterable[int], start: int, max_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(first byte, last byte, number of the first row, rows) of parts, by the offsets at which rows end."""
    row, rows, end = 1, 0, start
    for end in ends:
        rows += 1
        if rows == max_rows or end - start >= MAX_PART_BYTES:
            yield start, end, row, rows
            start, row, rows = end, row + rows, 0
    if rows:
        yield start, end, row, rows


def _object(location: str, line: bytes) -> dict[str, Any]:
    try:
        value = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise InputError(f"{location}: not valid JSON: {reason_of(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{location}: expected an object with named fields, found {type(value).__name__}")
    return value


def _object_ends(file: str, opened: IO[bytes], kinds: dict[str, set[str]]) -> Iterator[int]:
    """The end of each row of JSON lines, readable or not; adds the types of its values to `kinds`."""
    for end, line in _lines(file, opened):
        if not line.strip():
            continue
        try:
            values = _object(file, line)
        except InputError:
            values = {}
        for name, value in values.items():
            seen = kinds.setdefault(name, set())
            if value is not None:
                large = isinstance(value, int) and not -(2**63) <= value < 2**63
                seen.add("json" if large else _TYPES.get(type(value), "json"))
        if len(kinds) > MAX_COLUMNS:
            raise InputError(f"{file}: more than {MAX_COLUMNS:,} columns; put rare fields into one object")
        yield end


def _merged(types: set[str]) -> str:
    if types == {"int64", "double"}:
        return "double"
    return next(iter(types), "string") if len(types) <= 1 else "json"


def _read_objects(part: Part, opened: IO[bytes]) -> Iterator[dict[str, Any] | InputError]:
    number = part.row
    for end, line in _lines(part.address, opened, part.start):
        if line.strip():
            try:
                yield _object(f"row {number}", line)
            except InputError as error:
                yield error
            number += 1
        if end >= part.stop:
            return


def _header(file: str, opened: IO[bytes]) -> tuple[int, list[str], tuple[str, Literal[0, 3]]]:
    """Where the rows of a CSV file begin, its columns and its dialect."""
    text = TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    try:
        dialect = csv_dialect(file, text)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not valid UTF-8: {error.reason}; save the file as UTF-8") from None
    finally:
        text.detach()
    start, header = next(_csv_rows(file, opened, 0, dialect), (0, list[str]()))
    names = [name.strip() for name in header]
    refuse_repeated(f"{file}: first row", names)
    return start, names, dialect


def _csv_rows(
    file: str, opened: IO[bytes], start: int, dialect: tuple[str, Literal[0, 3]]
) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file from a byte on, each with the offset of its end.

    Raises: InputError for what is no CSV or not UTF-8.
    """
    end = start

    def lines() -> Iterator[str]:
        nonlocal end
        for line_end, line in _lines(file, opened, start):
            end = line_end
            yield line.decode()

    csv.field_size_limit(MAX_LINE_CHARACTERS)
    try:
        for row in csv.reader(lines(), delimiter=dialect[0], quoting=dialect[1], strict=True):
            if row:
                yield end, row
    except csv.Error as error:
        raise InputError(f"{file}: not valid CSV before byte {end:,}: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not valid UTF-8 before byte {end:,}: {error.reason}; save the file as UTF-8"
        ) from None


def _read_csv(part: Part, opened: IO[bytes]) -> Iterator[dict[str, Any] | InputError]:
    names = list(part.columns)
    for number, (end, row) in enumerate(_csv_rows(part.address, opened, part.start, part.dialect), part.row):
        if len(row) == len(names):
            yield dict(zip(names, row, strict=True))
        else:
            yield InputError(f"row {number}: {len(row)} fields where the header names {len(names)}")
        if end >= part.stop:
            return


def _parquet(file: str, opened: IO[bytes]) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(opened)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable Parquet file: {reason_of(error)}") from None


def _parquet_batches(part: Part, opened: IO[bytes]) -> Iterator[pa.Table]:
    """The rows of a part, from the row groups that have any of them."""
    with _parquet(part.address, opened) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        groups = [
            number
            for number, (end, size) in enumerate(zip(ends, sizes, strict=True))
            if end > part.start and end - size < part.stop
        ]
        at = ends[groups[0]] - sizes[groups[0]]
        try:
            for batch in file.iter_batches(ROWS_READ, groups):
                low, high = max(part.start - at, 0), min(part.stop - at, batch.num_rows)
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)])
                at += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{part.address}: not a readable Parquet file: {reason_of(error)}") from None
