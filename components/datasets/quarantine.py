"""Rows that an import leaves out, each with its location and the reason, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.datasets.formats import Row

BATCH_ROWS = 256
"""Rows checked at once: a batch costs Great Expectations a quarter of a second, however small."""
BATCH_BYTES = 64 << 20


class Quarantine:
    """The rows left out of one dataset. Entering it opens the file, which must be new; an error removes it."""

    def __init__(self, path: Path, check: Callable[[Sequence[Row]], Mapping[int, str]] = lambda rows: {}) -> None:
        self.path = path
        self.rows = 0
        self._failing: set[str] = set()
        self._check = check

    def __enter__(self) -> Quarantine:
        try:
            self._file = self.path.open("x", encoding="utf-8")
        except FileExistsError:
            raise InputError(f"--quarantine: {self.path} exists already; name a new file") from None
        except OSError as error:
            raise InputError(f"--quarantine: {self.path}: cannot be written: {error.strerror}") from None
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if exc_type is not None or not self.rows:
            self.path.unlink()

    def add(self, location: str, reason: str, values: Mapping[str, Any]) -> None:
        """Write a row down."""
        self.rows += 1
        line = {"location": location, "reason": reason.removeprefix(f"{location}: "), "row": values}
        self._file.write(json.dumps(line, default=_shown) + "\n")

    def passing(self, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """The rows, each with its location, that pass validation; the others are written down."""
        for batch in _batches(rows):
            failures = self._check([row for _, row in batch])
            for index, (location, row) in enumerate(batch):
                if index in failures:
                    self._failing.add(location)
                    self.add(location, failures[index], row)
                else:
                    yield location, row

    def passed(self, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """The same rows, read once more."""
        return ((location, row) for location, row in rows if location not in self._failing)


def _batches(rows: Iterator[tuple[str, Row]]) -> Iterator[list[tuple[str, Row]]]:
    batch: list[tuple[str, Row]] = []
    size = 0
    for location, row in rows:
        batch.append((location, row))
        size += sum(map(len, row.get("images") or ()))
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _shown(value: Any) -> str:
    return f"({len(value):,} bytes)" if isinstance(value, bytes) else str(value)
