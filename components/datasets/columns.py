"""Columns of a user's table: named by an option, or found in the first row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.datasets.conversations import ROLES
from components.datasets.records import Record

OTHER_OPTIONS = ("roles", "image_folder")
"""Fields of `Columns` that are no columns."""


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns, of the roles of turns and of a folder, where they differ from the defaults."""

    text: str | None = None
    label: str | None = None
    source: str | None = None
    target: str | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    image_folder: Path | None = None
    """Where relative paths of pictures begin; by default the folder of the file that names them."""


def columns_of(record: Record, options: Sequence[str], columns: Columns) -> Columns:
    """The columns of a file that has these options, by its first row."""
    names = [meaning for meaning in options if meaning not in OTHER_OPTIONS]
    chosen: dict[str, Any] = {meaning: _column(record, meaning, columns, names) for meaning in names}
    return replace(columns, **chosen)


def _column(record: Record, meaning: str, columns: Columns, meanings: Sequence[str]) -> str:
    """The column for a meaning: the one of the option, the one of that name, or a table's only column."""
    if named := getattr(columns, meaning):
        return str(named)
    if meaning in record.values:
        return meaning
    matching = [name for name in record.values if name.lower() == meaning]
    if not matching and len(meanings) == len(record.values) == 1:
        matching = list(record.values)
    if len(matching) != 1:
        raise InputError(
            f"{record.location}: {'more than one' if matching else 'no'} column {meaning!r}; "
            f"found columns: {', '.join(record.values) or 'none'}; name one with --{meaning}-column"
        )
    return matching[0]


def value_of(record: Record, name: str | None) -> Any:
    """A column's value; a dot in the name reaches into nested columns."""
    assert name is not None  # set from the first row
    if name in record.values:
        return record.values[name]
    value: Any = record.values
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise InputError(
                f"{record.location}: no column {name!r}; found columns: {', '.join(record.values) or 'none'}"
            )
        value = value[part]
    return value
