"""Pictures within messages: marks in their content, and what they mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.config.errors import InputError

if TYPE_CHECKING:
    from components.media.pictures import Picture

IMAGE = "<image>"
"""Stands in a message's content where a picture is; the pictures are in the message's `images`, in order."""


def with_pictures(messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Messages as read from a row of kind `images`, each with its pictures, which its marks count, in `images`.

    Raises: InputError when there are more or fewer marks than pictures.
    """
    left, complete = list(pictures), []
    for message in messages:
        count = str(message.get("content") or "").count(IMAGE)
        complete.append({**message, "images": left[:count]} if count else dict(message))
        del left[:count]
    marks = sum(str(message.get("content") or "").count(IMAGE) for message in messages)
    if marks != len(pictures):
        raise InputError(f"messages: {marks} marks {IMAGE} for {len(pictures)} pictures; give one for each")
    return complete


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The pictures of messages, in order."""
    return [picture for message in messages for picture in message.get("images") or ()]
