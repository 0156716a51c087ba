"""How every command prints its result: a table, or one JSON document with `--json`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; logs go to stderr.")]

_MIN_WIDTH, _MAX_WIDTH = 12, 100
"""Columns: of a column that is cut, and of text."""


def print_json(document: Any) -> None:
    """Print the JSON document of `--json`, in ASCII where the terminal's encoding lacks a character."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2, default=str)
    print(text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], fit: bool = False) -> None:
    """Print aligned columns under their names; None is left blank.

    With `fit`, the widest column is cut so that a line fits the terminal; what is piped elsewhere is not cut.
    """

    def text(cell: Any) -> str:
        return f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell)

    lines = [tuple(columns), *(tuple(map(text, row)) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    if fit and (sys.stdout.isatty() or "COLUMNS" in os.environ):
        surplus = sum(widths) + 2 * (len(widths) - 1) - shutil.get_terminal_size().columns
        widest = widths.index(max(widths))
        widths[widest] = max(_MIN_WIDTH, widths[widest] - max(0, surplus))
        lines = [tuple(map(_cut, line, widths)) for line in lines]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_markdown(text: str) -> None:
    """Print Markdown for a person: wrapped to the terminal, 80 columns where there is none."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=min(_MAX_WIDTH, shutil.get_terminal_size().columns), highlight=False).print(Markdown(text))


def print_indented(text: str, columns: int) -> None:
    """Print a text wrapped to the terminal, behind blank columns; nothing where it is empty."""
    width, blank = min(_MAX_WIDTH, shutil.get_terminal_size().columns), " " * columns
    for line in textwrap.wrap(text, width, initial_indent=blank, subsequent_indent=blank):
        print(line)


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else f"{cell[: width - 3]}..."


def say(line: str) -> None:
    """Print a line on stderr, beside the result on stdout."""
    print(line, file=sys.stderr, flush=True)
