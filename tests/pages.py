"""The pages of README and docs, piece by piece, for the tests that compare them with the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.config.params import Params

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "data/README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Text:
    """A piece of a page and where it is."""

    page: Path
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences(language: str) -> Iterator[Text]:
    """Fenced blocks of a language; `line` is that of their first line of content."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            if found[1] == language:
                yield Text(page, text.count("\n", 0, found.start()) + 2, found[2])


def prose(pattern: re.Pattern[str]) -> Iterator[tuple[Text, re.Match[str]]]:
    """Matches of a pattern outside fenced blocks."""
    for page in PAGES:
        text = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text(encoding="utf-8"))
        for found in pattern.finditer(text):
            yield Text(page, text.count("\n", 0, found.start()) + 1, found[0]), found


def is_parameter(dotted: str) -> bool:
    """Whether params.yaml may have this key."""
    model: Any = Params
    for part in dotted.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return False
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part not in fields:
            return False
        model = fields[part].annotation
    return True
