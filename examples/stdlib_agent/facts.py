"""Write the agent's facts into the one file that `Knowledge` reads: symbols, relations and a search index (FTS5)."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from examples.stdlib_agent.knowledge import listed
from examples.stdlib_agent.stdlib import Symbol
from examples.stdlib_agent.summaries import first_sentence, shortened

_SCHEMA = """
CREATE TABLE symbols (name TEXT PRIMARY KEY, kind TEXT, summary TEXT, bases TEXT, module TEXT, same TEXT) WITHOUT ROWID;
CREATE TABLE endings (ending TEXT COLLATE NOCASE, name TEXT, PRIMARY KEY (ending, name)) WITHOUT ROWID;
CREATE VIRTUAL TABLE texts USING fts5 (name UNINDEXED, words, summary, tokenize = 'porter unicode61');
"""


def build(path: Path, symbols: Iterable[Symbol]) -> None:
    """Write the file; equal symbols give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    indexed: set[str] = set()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(_SCHEMA)
        for symbol in sorted(symbols, key=lambda symbol: (symbol.name.count("."), symbol.name)):
            same = f"{symbol.family} {symbol.name.rpartition('.')[2]}"
            summary = shortened(symbol.docstring)
            row = (symbol.name, symbol.kind, summary, listed(symbol.bases), symbol.module, same)
            connection.execute("INSERT INTO symbols VALUES (?, ?, ?, ?, ?, ?)", row)
            parts = symbol.name.split(".")
            endings = [(".".join(parts[start:]), symbol.name) for start in range(1, len(parts))]
            connection.executemany("INSERT INTO endings VALUES (?, ?)", endings)
            # One object under several names is found under its shortest.
            if summary and same not in indexed:
                indexed.add(same)
                words = (symbol.name, name_words(symbol.name), first_sentence(symbol.docstring))
                connection.execute("INSERT INTO texts VALUES (?, ?, ?)", words)
        connection.execute("INSERT INTO texts (texts) VALUES ('optimize')")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")


def name_words(name: str) -> str:
    """`OrderedDict.move_to_end` → `Ordered Dict move to end`, whole parts too, so that either finds it."""
    parts = re.split(r"[._]", name)
    pieces = [piece for part in parts for piece in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", part)]
    return " ".join(dict.fromkeys([*parts, *pieces]))
