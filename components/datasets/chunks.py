"""Splits running text into documents: at headings and between paragraphs, at most a few pages each.

A whole book as one document could neither be held out in part nor compared with another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from components.datasets.records import Record

MAX_CHARS = 8192
"""Longest document cut from a running text."""
_MIN_DOCUMENTS = 64  # a short text is cut finer, so that some of it can be held out
_MIN_BLOCK_CHARS = 1024  # lines without a blank line between them are only split beyond this
_MAX_READ_CHARS = 1 << 24  # of a line at once
_WIKI_HEADING = re.compile(r"\s*(=(?: ?=){0,5}) \S.* =(?: ?=){0,5}\s*$")
_MARKDOWN_HEADING = re.compile(r"(#{1,6})\s+\S")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")


@dataclass(frozen=True)
class _Block:
    """A paragraph, or a heading."""

    line: int
    text: str
    level: int = 0
    """1 for the highest heading; 0 for a paragraph."""


def target_chars(files: Iterable[Path]) -> int:
    """Length in characters of the documents to cut from these texts."""
    size = sum(path.stat().st_size for path in files)
    return min(MAX_CHARS, max(1, size // _MIN_DOCUMENTS))


def read_text(path: Path, chars: int) -> Iterator[Record]:
    """Documents of about this many characters; a heading of the highest level starts a new one."""
    return _records(path.name, _blocks(_lines(path), max(chars, _MIN_BLOCK_CHARS), markdown=False), chars)


def read_markdown(path: Path) -> Iterator[Record]:
    """The file as one document, or, where it is long, its sections."""
    blocks = _blocks(_lines(path), MAX_CHARS, markdown=True)
    if path.stat().st_size <= MAX_CHARS:
        blocks = (_Block(block.line, block.text) for block in blocks)
    return _records(path.name, blocks, MAX_CHARS)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line), a very long line in pieces that end between words."""
    with path.open(encoding="utf-8-sig") as file:
        number = 1
        while line := file.readline(_MAX_READ_CHARS):
            start = 0
            while len(line) - start > MAX_CHARS:
                end = line.rfind(" ", start + MAX_CHARS // 2, start + MAX_CHARS) + 1 or start + MAX_CHARS
                yield number, line[start:end]
                start = end
            yield number, line[start:]
            number += line.endswith("\n")


def _blocks(lines: Iterable[tuple[int, str]], chars: int, markdown: bool) -> Iterator[_Block]:
    """Headings, and paragraphs of at most `chars` characters with the blank lines that follow them."""
    text, first, fenced, blank = "", 1, False, False
    for number, line in itertools.dropwhile(lambda numbered: numbered[1].isspace(), lines):
        fenced ^= markdown and bool(_FENCE.match(line))
        level = 0 if fenced else _heading_level(line, markdown)
        starts_paragraph = blank and not fenced and not line.isspace()
        blank = line.isspace()
        if text and (level or starts_paragraph or len(text) + len(line) > chars):
            yield _Block(first, text)
            text = ""
        if level:
            yield _Block(number, line, level)
            continue
        first = first if text else number
        text += line
    if text:
        yield _Block(first, text)


def _heading_level(line: str, markdown: bool) -> int:
    match = (_MARKDOWN_HEADING if markdown else _WIKI_HEADING).match(line)
    return len(re.sub(r"\s", "", match[1])) if match else 0


def _records(name: str, blocks: Iterable[_Block], chars: int) -> Iterator[Record]:
    """Blocks joined to documents; a heading stays with what follows it."""
    text, first, has_body = "", 1, False
    for block in blocks:
        full = len(text) >= chars // 2 if block.level else len(text) + len(block.text) > chars
        if has_body and (full or block.level == 1):
            yield Record(f"{name}:{first}", {"text": text.strip()})
            text, has_body = "", False
        first = first if text else block.line
        text += block.text
        has_body = has_body or not (block.level or block.text.isspace())
    if text.strip():
        yield Record(f"{name}:{first}", {"text": text.strip()})
