"""Docstrings with the area of the library reference that each belongs to: texts to classify."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from components.datasets.formats import Row
from examples.stdlib_agent.stdlib import Symbol

MIN_WORDS = 3
_FILE = Path(__file__).with_name("areas.yaml")


def labelled(
    label_of: Callable[[Symbol], str | None], symbols: Sequence[Symbol], suite: str | None = None
) -> Iterator[Row]:
    """The docstring of each symbol, without its name, under its label; without one, it is left out."""
    for symbol in symbols:
        text, label = inspect.cleandoc(symbol.docstring), label_of(symbol)
        if label and len(text.split()) >= MIN_WORDS:
            yield {"id": f"{symbol.name}#{symbol.kind}-area", "text": text, "label": label, "suite": suite}


def area(symbol: Symbol) -> str | None:
    """The area of a symbol's module."""
    return area_of(symbol.module, read_areas())


@cache
def read_areas() -> dict[str, str]:
    """The area of each module that areas.yaml names."""
    areas = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return {module: area for area, modules in areas.items() for module in modules}


def area_of(module: str, areas: Mapping[str, str]) -> str | None:
    """The area of a module or of the nearest package around it; None for one in no area."""
    while module and module not in areas:
        module = module.rpartition(".")[0]
    return areas.get(module)
