"""Records out of a user's files, one at a time: JSON lines, JSON arrays, CSV and Parquet.

A record knows its place ("faq.jsonl:12"), so that whatever is wrong with it can be said in one line.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from components.config.params import InputError

_BLOCK = 1 << 16
_MAX_VALUE_CHARS = 1 << 26  # of one value in a JSON array


@dataclass(frozen=True)
class Record:
    """One row of a file as it was written."""

    place: str
    """File and line or row, for messages."""
    values: dict[str, Any]


def inspect(path: Path, binary: bool = False) -> str:
    """SHA-256 of a file that can be read and, unless `binary`, is UTF-8 throughout.

    Raises: InputError saying why it cannot, with line and byte.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder; name the files in it, such as {path}/*")
    try:
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
    """Objects of a JSON array, or of JSON lines, whichever the file holds."""
    with path.open(encoding="utf-8-sig") as file:
        start = ""
        while not start and (line := file.readline(_BLOCK)):
            start = line.strip()
        lines = not start.startswith("[") and (path.suffix != ".json" or _is_json(start))
    return _json_lines(path) if lines else _json_values(path)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                value = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from None
            except RecursionError:
                raise InputError(f"{place}: not readable JSON: nested too deep") from None
            yield Record(place, _object(place, value))


def _json_values(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        stream = _JsonStream(path.name, file)
        array = stream.take("[")
        number = 0
        while not stream.at_end() and not (array and stream.take("]")):
            if array and number:
                stream.expect(",")
            number += 1
            line, value = stream.value()
            place = f"{path.name}: row {number} (line {line})"
            yield Record(place, _object(place, value))
        if not stream.at_end():
            raise InputError(f"{path.name}:{stream.line}: not valid JSON: something follows the closing bracket")
        if array and not stream.closed:
            raise InputError(
                f"{path.name}:{stream.line}: not valid JSON: the array is not closed; is the file complete?"
            )


class _JsonStream:
    """Values of a JSON text, holding little more of it than the value being read."""

    def __init__(self, name: str, file: TextIO) -> None:
        self.name = name
        self.line = 1
        self.closed = False
        self._file = file
        self._text = ""
        self._position = 0
        self._decoder = json.JSONDecoder()

    def at_end(self) -> bool:
        return not self._peek()

    def take(self, sign: str) -> bool:
        """Step over this sign if it comes next."""
        found = self._peek() == sign
        self._position += found
        self.closed = self.closed or (found and sign == "]")
        return found

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            raise InputError(f"{self.name}:{self.line}: not valid JSON: expected {sign!r}, found {self._peek()!r}")

    def value(self) -> tuple[int, Any]:
        """(line it starts on, value)."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                if end < len(self._text) or not self._fill():  # a number may go on in the next block
                    return self._step(end), value
            except RecursionError:
                raise InputError(f"{self.name}:{self.line}: not readable JSON: nested too deep") from None
            except json.JSONDecodeError as error:
                if len(self._text) > _MAX_VALUE_CHARS or not self._fill():
                    line = self.line + self._text.count("\n", self._position, error.pos)
                    raise InputError(f"{self.name}:{line}: not valid JSON: {error.msg}") from None

    def _peek(self) -> str:
        """The next sign that is not white space, without stepping over it; empty at the end."""
        while True:
            while self._position < len(self._text):
                sign = self._text[self._position]
                if not sign.isspace():
                    return sign
                self.line += sign == "\n"
                self._position += 1
            if not self._fill():
                return ""

    def _step(self, end: int) -> int:
        line = self.line
        self.line += self._text.count("\n", self._position, end)
        self._position = end
        return line

    def _fill(self) -> bool:
        """Read on, as much again as is waiting; whether there was more."""
        rest = self._text[self._position :]
        more = self._file.read(max(_BLOCK, len(rest)))
        self._text, self._position = rest + more, 0
        return bool(more)


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(
            f"{place}: expected an object with named fields, found {type(value).__name__} {str(value)[:40]!r}"
        )
    return value


def read_csv(path: Path) -> Iterator[Record]:
    """Rows of a CSV file with a header; the separator is the one of `, ; tab` that splits the header most."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        separator = max((",", ";", "\t"), key=header.count)
        file.seek(0)
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = _header(path.name, next(reader))
            for row in reader:
                if row:
                    yield Record(
                        f"{path.name}:{reader.line_num}", _fields(f"{path.name}:{reader.line_num}", names, row)
                    )
        except csv.Error as error:
            raise InputError(f"{path.name}:{reader.line_num}: not valid CSV: {error}") from None


def _header(name: str, row: list[str]) -> list[str]:
    names = [field.strip() for field in row]
    if not any(names) or len(set(names)) < len(names):
        raise InputError(
            f"{name}:1: expected a header of distinct column names, found {', '.join(map(repr, row))[:200]}"
        )
    return names


def _fields(place: str, names: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(names):
        raise InputError(
            f"{place}: {len(row)} fields where the header names {len(names)} ({', '.join(names)}); "
            "put fields that hold the separator in double quotes"
        )
    return dict(zip(names, row, strict=True))


def read_parallel(source: Path, target: Path) -> Iterator[Record]:
    """Pairs of two text files side by side: line 7 of the one is the source of line 7 of the other.

    Raises: InputError when one has more lines than the other.
    """
    with source.open(encoding="utf-8-sig") as sources, target.open(encoding="utf-8-sig") as targets:
        for number, (one, other) in enumerate(zip_longest(sources, targets), 1):
            if one is None or other is None:
                short, long = (source, target) if one is None else (target, source)
                raise InputError(
                    f"{short.name}:{number}: ends here, {long.name} goes on; parallel files have equally many lines"
                )
            yield Record(f"{source.name}:{number}", {"source": one.rstrip("\r\n"), "target": other.rstrip("\r\n")})


def read_parquet(path: Path) -> Iterator[Record]:
    """Rows of a Parquet file, a small batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path.name}: row {number}", values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path.name}: not a readable Parquet file: {reason}") from None
