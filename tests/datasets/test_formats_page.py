"""Every example of docs/formats.md is added and valid; examples under one heading become the same rows."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures_fuzz import mp4
from components.datasets.conversations import named_roles
from components.datasets.formats import read_rows
from components.datasets.importers import _KINDS, Columns, add
from components.validation.report import refusal
from components.validation.validate import Validator

ROOT = Path(__file__).parents[2]
_PART = re.compile(
    r"^(?:## (?P<kind>\w+)|### (?P<heading>.+)|```(?P<info>\w+ .+)\n(?P<body>(?s:.+?))\n```)$", re.MULTILINE
)


@dataclass
class Example:
    """Files of the page, side by side where they differ only in their suffix, and the options beside their names."""

    kind: str
    heading: str
    language: str
    options: list[str]
    files: dict[str, str] = field(default_factory=dict)


def examples() -> list[Example]:
    found: list[Example] = []
    kind = heading = ""
    for part in _PART.finditer((ROOT / "docs/formats.md").read_text(encoding="utf-8")):
        kind, heading = part["kind"] or kind, part["heading"] or heading
        if part["info"]:
            language, name, *options = shlex.split(part["info"].replace("writes ", ""))
            if (language, Path(name).suffix) != ("text", ".de"):
                found.append(Example(kind, heading, language, options))
            found[-1].files[name] = part["body"] + "\n"
    return found


EXAMPLES = examples()


def columns(options: list[str]) -> Columns:
    pairs = list(zip(options[::2], options[1::2], strict=True))
    named: dict[str, Any] = {name[2:].removesuffix("-column"): value for name, value in pairs if name != "--role"}
    return Columns(**named, roles=named_roles([value for name, value in pairs if name == "--role"]))


@pytest.fixture(scope="module")
def validator() -> Validator:
    return Validator(ROOT / "data/expectations")


def write_pictures(folder: Path) -> None:
    """The pictures and the clip that examples name."""
    Image.new("RGB", (2, 2), (200, 120, 40)).save(folder / "photo.png")
    Image.new("RGB", (2, 2), (10, 10, 10)).save(folder / "dark.png")
    (folder / "clip.mp4").write_bytes(mp4([np.full((16, 16, 3), number, np.uint8) for number in (0, 99, 200)]))


def rows_of(example: Example, folder: Path, validator: Validator, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of an example, without what names its file."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    if example.kind == "images":
        write_pictures(folder)
    for name, body in example.files.items():
        if example.language == "python":
            exec(body, {})
        else:
            (folder / name).write_text(body, encoding="utf-8")
    files = [folder / name for name in example.files]
    add(example.kind, files, "mine", folder / "added", columns(example.options))
    findings = validator.check(folder / "added/mine")
    assert findings.success, refusal([findings])
    rows = list(read_rows(folder / "added/mine", "train"))
    return [
        {name: value for name, value in row.items() if name not in ("id", "source" * ("text" in row))} for row in rows
    ]


@pytest.mark.parametrize("heading", dict.fromkeys((example.kind, example.heading) for example in EXAMPLES))
def test_examples_of_a_heading_become_the_same_rows(
    heading: tuple[str, str], tmp_path: Path, validator: Validator, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [one for one in EXAMPLES if (one.kind, one.heading) == heading]
    read = [rows_of(one, tmp_path / str(number), validator, monkeypatch) for number, one in enumerate(said)]
    assert len(said) > 1
    assert read[0]
    for one, rows in zip(said, read, strict=True):
        assert rows == read[0], list(one.files)


def test_the_page_has_examples_of_each_kind() -> None:
    assert {one.kind for one in EXAMPLES} == set(_KINDS)
