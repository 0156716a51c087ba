"""How every command prints its result: a table, or one JSON document with `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; logs go to stderr.")]


def print_json(document: Any) -> None:
    """Print the JSON document of `--json`, in ASCII where the terminal's encoding lacks a character."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2, default=str)
    print(text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns under their names; None is left blank."""

    def text(cell: Any) -> str:
        return f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell)

    lines = [tuple(columns), *(tuple(map(text, row)) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def say(line: str) -> None:
    """Print a line on stderr, beside the result on stdout."""
    print(line, file=sys.stderr, flush=True)
