"""The wordings that questions are made from, kept as data in the YAML files beside this one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Talk:
    """Wordings of one intent that wants no tool, and the reply to all of them."""

    intent: str
    reply: str
    templates: tuple[str, ...]


def templates(section: str) -> list[str]:
    """The templates of a section of phrasings.yaml."""
    file = _read("phrasings")
    return [_filled(template, file["words"]) for template in file[section]]


def template_groups(section: str) -> dict[str, list[str]]:
    """The templates of a section of phrasings.yaml that is parted further."""
    file = _read("phrasings")
    groups: dict[str, list[str]] = file[section]
    return {name: [_filled(template, file["words"]) for template in group] for name, group in groups.items()}


def talks() -> list[Talk]:
    file = _read("small_talk")
    return [
        Talk(intent, talk["reply"], tuple(_filled(template, file["words"]) for template in talk["templates"]))
        for intent, talk in file["talks"].items()
    ]


def hand_written(section: str) -> Any:
    """Wordings for tests alone, by a section of hand_written.yaml: a list, or lists by intent."""
    return _read("hand_written")[section]


@cache
def words(group: str) -> tuple[str, ...]:
    """A group of words.yaml."""
    text: str = _read("words")[group]
    return tuple(text.split(" | ") if " | " in text else text.split())


@cache
def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def _filled(template: str, shared: dict[str, str]) -> str:
    return re.sub(r"<(\w+)>", lambda match: shared[match[1]], template)
