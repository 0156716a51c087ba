"""The agent's facts: a graph of symbols, their bases and modules, and a search index, in one read-only SQLite file.

Every answer is one line. A user's text reaches SQL as a parameter and the index as quoted words, never as syntax.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from components.agent.tools import one_line
from components.config.params import InputError

NOT_FOUND = "not found: "
MAX_QUERY_WORDS = 24
MAX_SHOWN = 3
"""Names listed when a short name is ambiguous."""

_RANK = """
SELECT symbols.name, symbols.summary FROM texts JOIN symbols USING (name)
WHERE texts MATCH ? ORDER BY bm25(texts, 0, 2, 3), length(symbols.name), symbols.name LIMIT 1
"""
# Too frequent to tell symbols apart.
_STOP_WORDS = frozenset((
    "a", "an", "and", "any", "are", "as", "at", "be", "by", "can", "class", "do", "does", "for", "from",
    "function", "i", "in", "is", "it", "me", "my", "of", "on", "or", "python", "some", "that", "the", "there",
    "this", "to", "use", "used", "using", "what", "when", "which", "with", "would", "you",
))  # fmt: skip


class Knowledge:
    """Answers from the file, opened read-only, for any number of threads."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f'{path}: not found; run "loopwright run --until collect"')
        self._lock = threading.Lock()
        address = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        self._connection = sqlite3.connect(address, uri=True, check_same_thread=False)
        try:
            self._rows("SELECT name FROM symbols LIMIT 1")
        except sqlite3.DatabaseError as error:
            raise InputError(f'{path}: not a knowledge file ({error}); run "loopwright run --force"') from None

    def __del__(self) -> None:
        if connection := getattr(self, "_connection", None):
            connection.close()

    def lookup(self, symbol: str) -> str:
        """What a symbol is or does, as its docstring says; with its full name where the question had less.

        Raises: InputError for a short name that several symbols have.
        """
        entry = self._find(symbol)
        if isinstance(entry, str):
            return entry
        name, _, summary, _, _ = entry
        if not summary:
            return f"{name} has no docstring."
        return summary if name == bare(symbol) else f"{name}: {summary}"

    def bases(self, symbol: str) -> str:
        """The direct bases of a class: `A`, `A and B`, `A, B and C`.

        Raises: InputError for a symbol that is no class or ambiguous, or whose bases are computed when it is made.
        """
        entry = self._find(symbol)
        if isinstance(entry, str):
            return entry
        name, kind, _, bases, _ = entry
        if kind != "class":
            raise InputError(f"{name} is a {kind}, not a class")
        if not bases:
            raise InputError(f"{name} has no bases that are written down")
        return bases

    def module(self, symbol: str) -> str:
        """The public module that a symbol is in: `collections` for OrderedDict, `builtins` for dict.

        Raises: InputError for a module itself and for a short name that several symbols have.
        """
        entry = self._find(symbol)
        if isinstance(entry, str):
            return entry
        name, kind, _, _, module = entry
        if kind == "module":
            raise InputError(f"{name} is a module itself")
        return module

    def search(self, query: str) -> str:
        """The symbol that a description fits best, and its summary."""
        words = [word for word in re.findall(r"\w+", query.lower()) if word not in _STOP_WORDS][:MAX_QUERY_WORDS]
        quoted = [f'"{word}"' for word in dict.fromkeys(words)]
        for glue in (" AND ", " OR ") if quoted else ():
            for name, summary in self._rows(_RANK, glue.join(quoted)):
                return f"{name}: {summary}"
        return NOT_FOUND + one_line(query)

    def full_name(self, symbol: str) -> str:
        """The full name of the one symbol meant; empty where there is none, or several."""
        try:
            entry = self._find(symbol)
        except InputError:
            return ""
        return "" if isinstance(entry, str) else entry[0]

    def _find(self, symbol: str) -> tuple[str, str, str, str, str] | str:
        """(name, kind, summary, bases, module) of the one symbol meant; else what to say instead."""
        written = bare(symbol)
        chosen = "SELECT name, kind, summary, bases, module, same FROM symbols WHERE name"
        rows = self._rows(f"{chosen} = ?", written)
        if not rows:
            ending = f"{chosen} IN (SELECT name FROM endings WHERE ending = ?)"
            rows = self._rows(f"{ending} ORDER BY kind = 'method', length(name), name", written)
            # A short name rather means a function or class than a method; then letters' case decides.
            rows = [row for row in rows if (row[1] == "method") == (rows[0][1] == "method")]
            rows = [row for row in rows if f".{row[0]}".endswith(f".{written}")] or rows
        if not rows:
            return NOT_FOUND + one_line(written)
        different = {row[5]: row[0] for row in reversed(rows)}
        if len(different) > 1:
            names = sorted(different.values(), key=lambda name: (len(name), name))
            raise InputError(f"{written} may be {listed(names[:MAX_SHOWN], 'or')}")
        name, kind, summary, bases, module, _ = rows[0]
        return name, kind, summary, bases, module

    def _rows(self, statement: str, *values: str) -> list[tuple[str, ...]]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()


def listed(names: Iterable[str], last_word: str = "and") -> str:
    """`A, B and C`"""
    *first, last = list(names) or [""]
    return f"{', '.join(first)} {last_word} {last}" if first else last


def bare(symbol: str) -> str:
    """A symbol without the quotes, brackets and question mark around it; builtins go without their module."""
    return symbol.strip("`'\"?! \t\n").removesuffix("()").removeprefix("builtins.")
