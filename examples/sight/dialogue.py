"""Conversations about pictures, and the wordings of their questions (`wordings.yaml`)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from components.datasets.formats import Row, row_id
from components.media.messages import IMAGE

Exchange = tuple[str, str]
"""A question and its answer."""


def conversation(
    images: Sequence[bytes], exchanges: Sequence[Exchange], suite: str | None = None, marks: str = ""
) -> Row:
    """A row of kind `images`: questions about the same pictures, which come before the first of them.

    `marks` is the text with the pictures' places in it, one <image> for each where it is empty.
    """
    marks = marks or "\n".join([IMAGE] * len(images))
    messages = []
    for number, (question, answer) in enumerate(exchanges):
        messages.append({"role": "user", "content": question if number else f"{marks}\n{question}"})
        messages.append({"role": "assistant", "content": answer})
    digests = (hashlib.sha256(image).hexdigest() for image in images)
    identity = row_id(suite or "", *digests, *(message["content"] for message in messages))
    return {"id": identity, "images": list(images), "messages": messages, "tools": None, "suite": suite}


def wording(rng: random.Random, task: str, is_new: bool = False, **names: str) -> str:
    """A question of a task in words of training, or in words that training never sees."""
    templates = _templates()[task]["new" if is_new else "known"]
    return rng.choice(templates).format(**names)


@cache
def _templates() -> dict[str, dict[str, list[str]]]:
    text = Path(__file__).with_name("wordings.yaml").read_text(encoding="utf-8")
    templates: dict[str, dict[str, list[str]]] = yaml.safe_load(text)
    return templates
