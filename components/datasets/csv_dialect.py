"""How a CSV file is written: the separator of its fields, whether quotes enclose them, and the names in its header."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal, TextIO

from components.config.errors import InputError
from components.datasets.file_limits import bounded_lines

_GUESS_ROWS = 100  # to tell the separator by


def csv_dialect(name: str, file: TextIO) -> tuple[str, Literal[0, 3]]:
    """Separator of a CSV file, and `csv.QUOTE_MINIMAL` or `csv.QUOTE_NONE`.

    Raises: InputError where more than one fits.
    """
    if not name.lower().endswith(".tsv"):
        return _separator(name, file), csv.QUOTE_MINIMAL
    return "\t", csv.QUOTE_MINIMAL if _quoted(name, file) else csv.QUOTE_NONE


def _separator(name: str, file: TextIO) -> str:
    """The separator of `, ; tab` that splits the first rows into equally many fields; else what splits the header most.

    Raises: InputError when more than one does.
    """
    widths: dict[str, int] = {}
    fitting = []
    for separator in ",;\t":
        file.seek(0)
        rows = list(_readable(csv.reader(file, delimiter=separator, strict=True)))
        widths[separator] = len(rows[0]) if rows and '"' not in "".join(rows[0]) else 0
        if rows[-1:] != [[]] and widths[separator] > 1 and len({len(row) for row in rows}) == 1:
            fitting.append(separator)
    if len(fitting) > 1:
        raise InputError(
            f"{name}:1: {' and '.join(map(repr, fitting))} both separate its rows; "
            "put fields that hold the one that does not in double quotes"
        )
    return fitting[0] if fitting else max(widths, key=lambda separator: widths[separator])


def _readable(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The first rows of a CSV file; an unreadable row is empty, and the last."""
    try:
        yield from islice(filter(None, reader), _GUESS_ROWS)
    except csv.Error:
        yield []


def _quoted(name: str, file: TextIO) -> bool:
    """Whether quotes enclose fields of a `.tsv`: not where each line is a row by itself and quotes do not pair.

    Raises: InputError when quotes join lines of which each is a row by itself.
    """
    file.seek(0)
    tabs = {line.count("\t") for line in bounded_lines(name, file) if line.strip("\r\n")}
    if len(tabs) != 1 or tabs == {0}:
        return True
    file.seek(0)
    reader = csv.reader(file, delimiter="\t", strict=True)
    line, joined = 0, 0
    try:
        for _ in reader:
            joined = joined or (line + 1 if reader.line_num > line + 1 else 0)
            line = reader.line_num
    except csv.Error:
        return False
    if joined:
        raise InputError(
            f"{name}:{joined}: a quote joins it to the line below, and each is a row by itself; "
            "double the quotes that belong to the text, within a field in quotes"
        )
    return True


def refuse_repeated(location: str, names: Sequence[str]) -> None:
    """Raises: InputError when a header names no column, or one twice."""
    if not any(names) or len(set(names)) < len(names):
        raise InputError(
            f"{location}: expected a header of distinct column names, found {', '.join(map(repr, names))[:200]}"
        )
