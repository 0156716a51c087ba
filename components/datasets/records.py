"""Records of a user's files, one at a time: JSON lines, JSON arrays, CSV and Parquet.

A record knows its location ("faq.jsonl:12"), for messages in one line.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_jsonable_python

from components.config.errors import InputError, reason_of
from components.datasets.csv_dialect import csv_dialect, refuse_repeated
from components.datasets.file_limits import MAX_LINE_CHARACTERS, bounded_lines, check_parquet, repeated_texts

_BLOCK = 1 << 16
_MAX_VALUE_CHARS = 1 << 26  # of one value in a JSON array


def _integer(digits: str) -> int | Decimal:
    """An integer; one with more digits than Python converts to an int stays a Decimal."""
    return int(digits) if len(digits) <= sys.int_info.default_max_str_digits else Decimal(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)
decode_json = _DECODER.decode
"""The value of a JSON text, whatever the size of its numbers."""


@dataclass(frozen=True)
class Record:
    """One row of a file as it was written."""

    location: str
    """File and line or row, for messages."""
    values: dict[str, Any]


def inspect(path: Path, binary: bool = False) -> str:
    """SHA-256 of a readable file that, unless `binary`, is UTF-8 throughout.

    Raises: InputError with the reason, line and byte.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder; name the files in it, such as {path}/*")
        if not path.stat().st_size:
            raise InputError(f"{path}: empty file; nothing to add")
        return _digest(path, binary)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; check the name") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _digest(path: Path, binary: bool) -> str:
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = offset = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            data = b"" if binary else decoder.getstate()[0] + block  # a character may lie across two blocks
            try:
                decoder.decode(b"" if binary else block, final=not file.peek(1))
            except UnicodeDecodeError as error:
                start = offset - (len(data) - len(block)) + error.start
                line = lines + data.count(b"\n", 0, error.start) + 1
                guess = "it looks like UTF-16; " if start == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                byte = f"byte 0x{data[error.start]:02x} at offset {start}"
                raise InputError(f"{path}:{line}: invalid UTF-8, {byte}; {guess}save the file as UTF-8") from None
            lines += block.count(b"\n")
            offset += len(block)
    return digest.hexdigest()


def read_json(path: Path) -> Iterator[Record]:
    """Objects of a JSON array or of JSON lines."""
    with path.open(encoding="utf-8-sig") as file:
        start = ""
        while not start and (line := file.readline(_BLOCK)):
            start = line.strip()
        lines = not start.startswith("[") and (path.suffix.lower() != ".json" or _is_json(start))
    return _json_lines(path) if lines else _json_values(path)


def _is_json(text: str) -> bool:
    try:
        decode_json(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(bounded_lines(path.name, file), 1):
            if not line.strip():
                continue
            location = f"{path.name}:{number}"
            try:
                value = decode_json(line.rstrip())
            except json.JSONDecodeError as error:
                raise InputError(f"{location}: not valid JSON: {error.msg} at column {error.colno}") from None
            except RecursionError:
                raise InputError(f"{location}: not readable JSON: nested too deep") from None
            yield Record(location, _object(location, value))


def _json_values(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        stream = JsonStream(path.name, file)
        array = stream.take("[")
        number = 0
        while not stream.at_end() and not (array and stream.take("]")):
            if array and number:
                stream.expect(",")
            number += 1
            line, value = stream.value()
            location = f"{path.name}: row {number} (line {line})"
            yield Record(location, _object(location, value))
        if not stream.at_end():
            raise InputError(f"{path.name}:{stream.line}: not valid JSON: something follows the closing bracket")
        if array and not stream.closed:
            raise InputError(
                f"{path.name}:{stream.line}: not valid JSON: the array is not closed; is the file complete?"
            )


class JsonStream:
    """Incremental reader of JSON values; holds little more text than the value being read."""

    def __init__(self, name: str, file: TextIO) -> None:
        self.name = name
        self.line = 1
        self.closed = False
        self._file = file
        self._text = ""
        self._position = 0

    def at_end(self) -> bool:
        return not self._peek()

    def take(self, character: str) -> bool:
        """Step over this character if it comes next."""
        is_next = self._peek() == character
        self._position += is_next
        self.closed = self.closed or (is_next and character == "]")
        return is_next

    def expect(self, character: str) -> None:
        if not self.take(character):
            raise InputError(f"{self.name}:{self.line}: not valid JSON: expected {character!r}, found {self._peek()!r}")

    def value(self) -> tuple[int, Any]:
        """(line it starts on, value)."""
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
                if end < len(self._text) or not self._fill():  # a number may go on in the next block
                    return self._step(end), value
            except RecursionError:
                raise InputError(f"{self.name}:{self.line}: not readable JSON: nested too deep") from None
            except json.JSONDecodeError as error:
                if len(self._text) > _MAX_VALUE_CHARS or not self._fill():
                    line = self.line + self._text.count("\n", self._position, error.pos)
                    raise InputError(f"{self.name}:{line}: not valid JSON: {error.msg}") from None

    def _peek(self) -> str:
        """The next character that is not white space, without stepping over it; empty at the end."""
        while True:
            while self._position < len(self._text):
                character = self._text[self._position]
                if not character.isspace():
                    return character
                self.line += character == "\n"
                self._position += 1
            if not self._fill():
                return ""

    def _step(self, end: int) -> int:
        line = self.line
        self.line += self._text.count("\n", self._position, end)
        self._position = end
        return line

    def _fill(self) -> bool:
        """Read as much again as is unread; whether there was more."""
        rest = self._text[self._position :]
        more = self._file.read(max(_BLOCK, len(rest)))
        self._text, self._position = rest + more, 0
        return bool(more)


def _object(location: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(
            f"{location}: expected an object with named fields, found {type(value).__name__} {str(value)[:40]!r}"
        )
    return value


def read_csv(path: Path) -> Iterator[Record]:
    """Rows of a CSV file with a header; the separator is a tab in a `.tsv`, else the one that fits the first rows."""
    csv.field_size_limit(MAX_LINE_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator, quoting = csv_dialect(path.name, file)
        file.seek(0)
        reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
        try:
            names = [field.strip() for field in next(reader, [])]
            refuse_repeated(f"{path.name}:1", names)
            for row in filter(None, reader):
                location = f"{path.name}:{reader.line_num}"
                if len(row) != len(names):
                    raise InputError(
                        f"{location}: {len(row)} fields where the header names {len(names)} ({', '.join(names)}); "
                        "put fields that hold the separator in double quotes"
                    )
                yield Record(location, dict(zip(names, row, strict=True)))
        except csv.Error as error:
            raise InputError(f"{path.name}:{reader.line_num}: not valid CSV: {error}") from None


def read_parallel(source: Path, target: Path) -> Iterator[Record]:
    """Pairs of two parallel text files: a line of `source` with the same line of `target`.

    Raises: InputError when one has more lines than the other.
    """
    # Only a line feed ends a line: a carriage return within one would shift all pairs below it.
    with (
        source.open(encoding="utf-8-sig", newline="\n") as sources,
        target.open(encoding="utf-8-sig", newline="\n") as targets,
    ):
        lines = (bounded_lines(source.name, sources), bounded_lines(target.name, targets))
        for number, (line, other) in enumerate(zip_longest(*lines), 1):
            if line is None or other is None:
                short, long = (source, target) if line is None else (target, source)
                raise InputError(
                    f"{short.name}:{number}: ends here, {long.name} goes on; parallel files have equally many lines"
                )
            yield Record(f"{source.name}:{number}", {"source": line.rstrip("\r\n"), "target": other.rstrip("\r\n")})


def read_parquet(path: Path, batch_rows: int = 256) -> Iterator[Record]:
    """Rows of a Parquet file as JSON values, so many in memory at a time."""
    location = path.name
    try:
        schema, number = pq.read_schema(path), 0
        with pq.ParquetFile(path, read_dictionary=repeated_texts(schema)) as file:
            check_parquet(location, file.metadata, path.stat().st_size)
            refuse_repeated(location, schema.names)
            features = _features(schema)
            for batch in file.iter_batches(batch_size=batch_rows):
                for row in range(batch.num_rows):
                    number += 1
                    location = f"{path.name}: row {number}"
                    values = {
                        field.name: _plain(column[row].as_py(), field.type, features.get(field.name))
                        for field, column in zip(schema, batch.columns, strict=True)
                    }
                    yield Record(location, values)
    except InputError:
        raise
    # pyarrow raises these for damaged files, dates beyond Python's and unknown time zones.
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        reason = reason_of(error)
        raise InputError(f"{location}: not a readable Parquet file: {reason}") from None


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The features of the columns, as the library `datasets` stores them in the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, LookupError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _plain(value: Any, kind: Any, feature: Any) -> Any:
    """An Arrow value as a JSON value, classes by their names.

    All rows of a struct have all its fields: null means that the row has no such field. Maps become objects, dates and
    times ISO 8601, bytes text where they are UTF-8.
    """
    features = feature if isinstance(feature, dict) else {}
    if value is None:
        return None
    if pa.types.is_struct(kind):
        fields = {field.name: _plain(value[field.name], field.type, features.get(field.name)) for field in kind}
        return {name: item for name, item in fields.items() if item is not None}
    if pa.types.is_map(kind):
        keys = [str(_plain(key, kind.key_type, None)) for key, _ in value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a map holds a key twice: {keys}")
        return dict(zip(keys, (_plain(item, kind.item_type, None) for _, item in value), strict=True))
    if isinstance(value, list):
        inner = features.get("feature") or (feature[0] if isinstance(feature, list) and feature else None)
        return [_plain(item, kind.value_type, inner) for item in value]
    if features.get("_type") == "ClassLabel" and features.get("names"):
        return features["names"][value] if 0 <= value < len(features["names"]) else None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return decode_json(value)
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, Decimal):
        number = decode_json(format(value, "f")) if value.is_finite() else value
        return number if Decimal(str(number)) == value else str(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return to_jsonable_python(value) if isinstance(value, timedelta | UUID) else value
