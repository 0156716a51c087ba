"""What one architecture of Hugging Face's is to us: its config.json read field by field, its tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from components.config.params import InputError

LARGEST = 2**24
"""Above any number of tokens, positions or layers that a model has."""
Names = Mapping[str, str | tuple[str, ...]]
"""Our module or weight, `{n}` for the number of its block, to Hugging Face's; several for a fused product."""


@dataclass(frozen=True)
class Fields:
    """The fields of a config.json; every error names the field."""

    path: Path
    values: dict[str, Any]

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number from 0 to LARGEST."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
            raise InputError(f"{self.path}: {name}: {value!r} is not a whole number from 0 to {LARGEST:,}")
        return value

    def number(self, name: str, default: float | None) -> float:
        value = self._value(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise InputError(f"{self.path}: {name}: {value!r} is not a number")
        return float(value)

    def choice(self, name: str, default: Any, allowed: Collection[Any]) -> Any:
        """A value out of `allowed`; others are not supported."""
        value = self._value(name, default)
        if value not in allowed:
            known = ", ".join(map(repr, allowed))
            raise InputError(f"{self.path}: {name}: {value!r} is not supported; allowed: {known}")
        return value

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise InputError(f"{self.path}: {name} is missing")
        return default if value is None else value


@dataclass(frozen=True)
class Format:
    """One architecture: how its configuration and its tensors become ours and back."""

    model: Callable[[Any], nn.Module]
    read: Callable[[Fields], Any]
    write: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], Names]
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that repeat others, or that are computed."""
    optional: tuple[str, ...] = ()
    """Beginnings of the names of tensors that a folder may lack; they are initialized."""
    settle: Callable[[Any, Collection[str]], Any] = lambda config, names: config
    """The configuration, given the names of the folder's tensors."""
    base: str = ""
    """The architecture of a folder whose config.json names this one, but none of whose tensor names begin with
    `prefix`: the model without its head, as sentence-transformers writes it."""
    prefix: str = ""
